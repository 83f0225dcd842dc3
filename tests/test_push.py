"""`llmprune push` and all that can go wrong on the way, with the real clients and a Hub on the loopback.

Every command is a process of its own (tests/loopback/forks.py): refused before it begins, cut at every step, killed in
the middle, or met by another push. Each ends in one sentence that says how to go on, and going on completes it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import llmprune
from llmprune.checkpoint.card import is_generated
from tests.builders import tiny_model, tiny_tokenizer
from tests.loopback.forks import Ended, Forks, forks
from tests.loopback.hub import READ_TOKEN, WRITE_TOKEN, WRONG_TOKEN, LoopbackHub, hub
from tests.test_hub_end_to_end import BASE, FIRST_LINE, SMALL, assert_same_files, paths, seed

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A folder with a pruned model, `pruned`, and the same in shards, `sharded`."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "desk").mkdir()
    for name, size in (("pruned", "5GB"), ("sharded", "50KB")):
        model = tiny_model("gpt2")
        options = {"method": "magnitude", "max_shard_size": size, "output_dir": folder / "desk" / name}
        llmprune.prune(model, tokenizer=tiny_tokenizer(), dataset=IDS, **options)
    with hub(folder) as server, forks(server, folder / "desk") as desk:
        seed(server, folder / "base")
        yield desk


@pytest.fixture(autouse=True)
def _a_hub_without_faults(desk: Forks) -> Iterator[None]:
    yield
    desk.hub.faults.clear()


def the_error(done: Ended) -> str:
    """What a failed command says: one line, no traceback, no token."""
    text = done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in text
    assert not any(token in text for token in (WRITE_TOKEN, READ_TOKEN, WRONG_TOKEN))
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def command_to_go_on(error: str) -> list[str]:
    """The arguments of the `llmprune push …` that an error recommends."""
    program, *arguments = shlex.split(error.split("`")[1])
    assert program == "llmprune"
    return arguments


def assert_arrived(server: LoopbackHub, repo_id: str, directory: Path) -> None:
    assert_same_files(server, repo_id, directory, others=set())


# Refused before anything happens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo_id", "expected"),
    [
        (WRONG_TOKEN, "acme/x", "The Hub does not let you push: the token is not valid (Invalid user token"),
        (READ_TOKEN, "acme/x", "Your Hub token may only read, so nothing can be pushed"),
        (WRITE_TOKEN, "bob/x", "the token belongs to alice, who may write to alice, acme"),
        (WRITE_TOKEN, "acme/2:4", "'acme/2:4' is no name for a Hub repository"),
        ("", "acme/x", "Pushing needs a Hub token that may write, and there is none"),
    ],
    ids=["wrong", "read-only", "foreign", "no name", "none"],
)
@pytest.mark.parametrize("verb", ["prune", "push"])
def test_who_may_not_push_is_told_at_once(desk: Forks, verb: str, token: str, repo_id: str, expected: str) -> None:
    """Before a model is loaded or a file is read; the Hub is asked who we are, and nothing else."""
    pruning = [*shlex.split(FIRST_LINE)[1:], *SMALL, "--quiet", "--push-to-hub", repo_id]
    asked = len(desk.hub.requests)
    done = desk.llmprune(*(pruning if verb == "prune" else ["push", "pruned", repo_id]), code=2, HF_TOKEN=token)
    assert expected in the_error(done)
    assert set(paths(desk.hub, asked)) <= {"/api/whoami-v2"}
    assert not (desk.folder / "gpt2-alps-2of4").exists()


def test_a_spoilt_checkpoint_is_not_pushed(desk: Forks) -> None:
    shutil.copytree(desk.folder / "pruned", desk.folder / "spoilt")
    shard = desk.folder / "spoilt/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    error = the_error(desk.llmprune("push", "spoilt", code=2))
    assert "is not what its report says" in error
    assert ("model", "alice/spoilt") not in desk.hub.store.repos


# The ways to push -----------------------------------------------------------------------------------------------------


def test_a_directory_under_its_own_name_and_again_without_a_commit(desk: Forks) -> None:
    done = desk.llmprune("push", "pruned")
    sha = desk.hub.repo("alice/pruned").refs["main"]
    count = len(list((desk.folder / "pruned").iterdir()))
    said = f"{desk.hub.url}/alice/pruned, commit {sha}: {count} files, all as they are here.\n"
    assert done.stdout == said
    assert "is what its report says" in done.stderr
    assert_arrived(desk.hub, "alice/pruned", desk.folder / "pruned")
    assert desk.llmprune("push", "pruned").stdout == said
    assert len(desk.hub.repo("alice/pruned").commits) == 2


def test_what_arrived_is_read_back_from_its_commit(desk: Forks) -> None:
    asked = len(desk.hub.requests)
    desk.llmprune("push", "sharded", "acme/read-back")
    sha = desk.hub.repo("acme/read-back").refs["main"]
    read = [path for path in paths(desk.hub, asked) if sha in path]
    assert any(path.endswith(f"/resolve/{sha}/config.json") for path in read)
    assert any(re.search(rf"/resolve/{sha}/model-00001-of-\d+\.safetensors$", path) for path in read)


def test_bytes_that_the_storage_has_lost_are_found(desk: Forks) -> None:
    """The Hub still names the file by what it should be."""
    desk.hub.forget(desk.folder / "pruned")
    hold = desk.hub.hold(r"/resolve/[0-9a-f]{40}/config")
    running = desk.start("push", "pruned", "acme/lost", **NO_XET)
    assert hold.reached.wait(timeout=60)
    sha256 = hashlib.sha256((desk.folder / "pruned/model.safetensors").read_bytes()).hexdigest()
    desk.hub.store.objects[sha256] = desk.hub.store.objects[sha256][:-1] + b"\x55"
    hold.released.set()
    done = running.end()
    desk.hub.forget(desk.folder / "pruned")
    assert done.code == 2
    assert "is not what was sent, the end of model.safetensors reads back otherwise" in the_error(done)


def test_a_branch_and_a_private_repository(desk: Forks) -> None:
    done = desk.llmprune("push", "pruned", "acme/branched", "--revision", "v1/a", "--private")
    assert done.stdout.startswith(f"{desk.hub.url}/acme/branched/tree/v1/a, commit ")
    assert desk.hub.repo("acme/branched").private
    assert desk.hub.files("acme/branched") == {".gitattributes"}
    assert "model.safetensors" in desk.hub.repo("acme/branched").at("v1/a")[1]


def test_a_branch_in_shards_over_stale_dense_weights_by_lfs_and_privately(desk: Forks) -> None:
    """A `model.safetensors` left in the repository would be loaded in place of the shards, without a word."""
    desk.hub.store.create("model", "acme/stale", private=True)
    dense = {name: (desk.folder.parent / "base" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    desk.hub.add("acme/stale", {"notes.txt": b"stays", "pytorch_model.bin": b"\0", **dense})
    arguments = ["--model", BASE, "--revision", "negative", *SMALL, "--max-shard-size", "50KB", "--no-eval", "--quiet"]
    asked = len(desk.hub.requests)
    desk.llmprune(*arguments, "--output-dir", "lfs", "--push-to-hub", "acme/stale", **NO_XET)
    saved, sent = desk.folder / "lfs", [path for path in paths(desk.hub, asked) if "acme/stale" in path]
    assert_same_files(desk.hub, "acme/stale", saved, others={"notes.txt"})
    titles = [commit.title for commit in desk.hub.repo("acme/stale").commits.values()]
    assert titles.count("Upload a model pruned with llmprune") == 1
    assert any(path.endswith("/info/lfs/objects/batch") for path in sent)
    assert not any("xet-write-token" in path for path in sent)
    shards = [load_file(path) for path in saved.glob("model-*.safetensors")]
    assert len(shards) > 1
    (norm,) = (shard["transformer.ln_f.weight"] for shard in shards if "transformer.ln_f.weight" in shard)
    assert (norm == -1).all()

    measure = ["eval", "--dataset", "wikitext2", "--tokens", "64", "--seq-len", "32", "--json", "--model"]
    assert "acme/stale" in the_error(desk.llmprune(*measure, "acme/stale", code=2, HF_TOKEN=""))
    loaded, local = (json.loads(desk.llmprune(*measure, name).stdout) for name in ("acme/stale", "lfs"))
    assert loaded["rows"][0]["value"] == local["rows"][0]["value"]


def test_a_pull_request_to_somebody_elses_repository(desk: Forks) -> None:
    """With an interruption: the second try goes on in the same one."""
    desk.hub.add("bob/model", {"config.json": b"{}"})
    desk.hub.fault("/preupload/", status=403, message="not now")
    error = the_error(desk.llmprune("push", "pruned", "bob/model", "--create-pr", code=2))
    assert "the Hub forbids it (not now)" in error
    assert command_to_go_on(error)[2:] == ["bob/model", "--revision", "refs/pr/1"]
    assert desk.llmprune(*command_to_go_on(error)).stdout.startswith(
        f"{desk.hub.url}/bob/model/tree/refs/pr/1, commit "
    )
    repo = desk.hub.repo("bob/model")
    assert len(repo.pull_requests) == 1
    assert "model.safetensors" in repo.at("refs/pr/1")[1]
    assert desk.hub.files("bob/model") == {".gitattributes", "config.json"}


def test_a_pull_request_that_would_change_nothing_is_not_opened(desk: Forks) -> None:
    desk.llmprune("push", "pruned", "acme/asked")
    done = desk.llmprune("push", "pruned", "acme/asked", "--create-pr")
    repo = desk.hub.repo("acme/asked")
    assert done.stdout.startswith(f"{desk.hub.url}/acme/asked, commit {repo.refs['main']}: ")
    assert "acme/asked has all of this on main already, so no pull request was opened." in done.stderr
    assert repo.pull_requests == []
    desk.llmprune("push", "sharded", "acme/asked", "--create-pr")
    assert "model.safetensors" not in repo.at("refs/pr/1")[1]
    assert "model.safetensors" in repo.at("main")[1]


def test_a_public_repository_does_not_pass_for_a_private_one(desk: Forks) -> None:
    desk.hub.add("acme/public", {"notes.txt": b"\n"})
    error = the_error(desk.llmprune("push", "pruned", "acme/public", "--private", code=2))
    assert "acme/public exists and is public" in error
    assert desk.hub.files("acme/public") == {".gitattributes", "notes.txt"}


def test_a_card_that_a_person_wrote_stays(desk: Forks) -> None:
    """In the repository, with a word about it; one in the directory that was edited goes up as it is."""
    own = b"# Mine\n"
    desk.hub.add("acme/own-card", {"README.md": own})
    done = desk.llmprune("push", "pruned", "acme/own-card")
    assert "acme/own-card has a README.md that llmprune did not write; it stays" in done.stderr
    assert desk.hub.repo("acme/own-card").at("main")[1]["README.md"].content == own
    assert "model.safetensors" in desk.hub.files("acme/own-card")

    shutil.copytree(desk.folder / "pruned", desk.folder / "edited")
    card = desk.folder / "edited/README.md"
    assert is_generated(card)
    card.write_text(card.read_text().replace("Limits", "My limits"))
    desk.llmprune("push", "edited", "acme/own-card")
    assert_arrived(desk.hub, "acme/own-card", desk.folder / "edited")


# Broken off on the way ------------------------------------------------------------------------------------------------

TOLD = {
    "who am I": ("/api/whoami", "The Hub does not let you push: the Hub does not answer ("),
    "may I write": ("/auth-check/", "You cannot push to acme/cut: the Hub does not answer ("),
    "make it": ("/api/repos/create", "The push to acme/cut failed: the Hub does not answer ("),
    "what is its card": ("/resolve/main/README.md", "The push to acme/cut failed: the Hub does not answer ("),
    "is the card sound": ("/api/validate-yaml", "The push to acme/cut failed: the Hub does not answer ("),
    "chunks": ("/_cas/", "The push to acme/cut failed: the Hub's storage does not answer ("),
    "read the configuration back": (
        r"/resolve/[0-9a-f]{40}/config",
        "The push to acme/cut failed: the Hub does not answer (",
    ),
    "read a shard back": (r"/resolve/[0-9a-f]{40}/model", "The push to acme/cut failed: the Hub does not answer ("),
}
"""Steps at which a line that stays cut ends the push, in their order: address, and what is said."""

SURVIVED = [
    *("/tree/main", "/preupload/", "/xet-write-token/", "/_cas/v1/xorbs/", "/_cas/v2/shards", "/commit/main"),
    r"/tree/[0-9a-f]{40}",
]
"""Steps that the clients try again by themselves, for up to half a minute."""

SURVIVED_BY_LFS = ["/info/lfs/objects/batch", "/_lfs/", "/_lfs-verify/"]
NO_XET = {"HF_HUB_DISABLE_XET": "1"}


@pytest.mark.parametrize("step", TOLD)
def test_a_line_that_stays_cut_is_told_in_one_sentence(desk: Forks, step: str) -> None:
    address, expected = TOLD[step]
    desk.hub.fault(address, times=99)
    error = the_error(desk.llmprune("push", "pruned", "acme/cut", code=2))
    assert error.startswith(f"Error: {expected}")
    assert "The push" not in expected or command_to_go_on(error) == ["push", str(desk.folder / "pruned"), "acme/cut"]


@pytest.mark.parametrize(
    ("step", "options", "xet"),
    [("/branch/", ["--revision", "b"], True), ("/discussions", ["--create-pr"], True), ("/commit/", [], False)],
    ids=["branch", "pull request", "commit by LFS"],
)
def test_so_it_is_on_the_other_ways(desk: Forks, step: str, options: list[str], xet: bool) -> None:
    desk.hub.fault(step, times=99)
    settings = {} if xet else NO_XET
    error = the_error(desk.llmprune("push", "pruned", "acme/ways", *options, code=2, **settings))
    assert error.startswith("Error: The push to acme/ways failed: the Hub does not answer (")
    assert command_to_go_on(error) == ["push", str(desk.folder / "pruned"), "acme/ways", *options]


def test_after_all_these_cuts_the_same_command_completes_it(desk: Forks) -> None:
    desk.llmprune("push", "pruned", "acme/cut")
    assert_arrived(desk.hub, "acme/cut", desk.folder / "pruned")


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_a_line_that_is_cut_once_is_survived(desk: Forks, way: str) -> None:
    """At every other step, in the middle of a body where there is one."""
    desk.hub.forget(desk.folder / "sharded")
    for step in SURVIVED if way == "xet" else SURVIVED_BY_LFS:
        desk.hub.fault(step, after=100)
    desk.llmprune("push", "sharded", f"acme/survived-{way}", **({} if way == "xet" else NO_XET))
    assert all(fault.times == 0 for fault in desk.hub.faults)
    assert_arrived(desk.hub, f"acme/survived-{way}", desk.folder / "sharded")


@pytest.mark.parametrize(
    ("address", "status", "message", "expected"),
    [
        ("/preupload/", 403, "Private repository storage limit reached", "(Private repository storage limit reached)"),
        ("/xet-write-token/", 403, "over quota", "403"),
        ("/_cas/v1/xorbs/", 507, "full", "there is not enough space on the Hub"),
        ("/commit/", 413, "too large", "there is not enough space on the Hub (too large)"),
        ("/commit/", 412, "behind", "the repository was changed at the same time (behind)"),
        ("/api/validate-yaml", 400, "bad yaml", "README.md"),
    ],
)
def test_a_refusal_keeps_the_model_and_says_why(
    desk: Forks, address: str, status: int, message: str, expected: str
) -> None:
    desk.hub.fault(address, status=status, message=message, times=99)
    error = the_error(desk.llmprune("push", "pruned", "acme/refused", "--private", code=2))
    assert error.startswith("Error: The push to acme/refused failed: ")
    assert expected in error
    assert command_to_go_on(error) == ["push", str(desk.folder / "pruned"), "acme/refused", "--private"]
    assert desk.hub.files("acme/refused") == {".gitattributes"}


def test_by_lfs_a_storage_that_fails_is_told_too(desk: Forks) -> None:
    desk.hub.forget(desk.folder / "pruned")
    desk.hub.fault("/_lfs/", status=507, message="full", times=99)
    error = the_error(desk.llmprune("push", "pruned", "acme/lfs", code=2, **NO_XET))
    assert "there is not enough space on the Hub" in error
    desk.hub.faults.clear()
    desk.llmprune(*command_to_go_on(error), **NO_XET)
    assert_arrived(desk.hub, "acme/lfs", desk.folder / "pruned")


def test_a_job_whose_push_fails_shows_its_result_all_the_same(desk: Forks) -> None:
    desk.hub.fault("/commit/", status=413, message=f"no room for {WRITE_TOKEN}", times=99)
    arguments = [*shlex.split(FIRST_LINE)[1:], *SMALL, "--method", "wanda", "--output-dir", "job", "--push-to-hub"]
    done = desk.llmprune(*arguments, "acme/job", code=2)
    assert "perplexity on wikitext2" in done.stdout
    error = the_error(replace(done, stdout=""))
    assert "there is not enough space on the Hub (no room for ***)" in error
    written = [path.read_bytes() for path in (desk.folder / "job").iterdir()]
    assert not any(WRITE_TOKEN.encode() in content for content in (done.stdout.encode(), *written))
    desk.hub.faults.clear()
    desk.llmprune(*command_to_go_on(error))
    assert_arrived(desk.hub, "acme/job", desk.folder / "job")


@pytest.mark.parametrize("address", ["/_cas/v1/xorbs/", "/commit/"])
def test_killed_in_the_middle_and_started_again(desk: Forks, address: str) -> None:
    repo_id = f"acme/killed-{len(address)}"
    hold = desk.hub.hold(address)
    running = desk.start("push", "pruned", repo_id)
    assert hold.reached.wait(timeout=60)
    running.kill()
    assert running.end().code == -9
    hold.released.set()
    time.sleep(0.1)  # the Hub may finish what it was doing; a commit that came whole counts
    assert desk.hub.files(repo_id) in ({".gitattributes"}, {*_names(desk.folder / "pruned"), ".gitattributes"})
    desk.llmprune("push", "pruned", repo_id)
    assert_arrived(desk.hub, repo_id, desk.folder / "pruned")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Two at once ----------------------------------------------------------------------------------------------------------


def test_the_same_model_pushed_twice_at_once(desk: Forks) -> None:
    """Both find no repository, both make it, and one of the two commits changes nothing."""
    holds = [desk.hub.hold("/api/repos/create") for _ in range(2)]
    both = [desk.start("push", "pruned", "acme/twice") for _ in holds]
    for hold in holds:
        assert hold.reached.wait(timeout=60)
    for hold in holds:
        hold.released.set()
    assert [one.end().code for one in both] == [0, 0]
    assert_arrived(desk.hub, "acme/twice", desk.folder / "pruned")


def test_another_models_weights_that_came_in_between_are_found(desk: Forks) -> None:
    """A push that began when the repository was empty could not know that it must delete a `model.safetensors`."""
    hold = desk.hub.hold("/commit/")
    first = desk.start("push", "sharded", "acme/crossed")
    assert hold.reached.wait(timeout=60)
    desk.llmprune("push", "pruned", "acme/crossed")
    hold.released.set()
    done = first.end()
    assert done.code == 2
    error = the_error(done)
    assert "is not what was sent, model.safetensors, of another push, would be loaded too" in error
    desk.llmprune(*command_to_go_on(error))
    assert_arrived(desk.hub, "acme/crossed", desk.folder / "sharded")
