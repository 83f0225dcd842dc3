"""From a hub id to a pushed model and back, with the real clients, each in a process of its own.

The Hub is tests/loopback. It serves a tiny GPT-2 under the name of the real one, and few lines of text under the names
of C4 and WikiText-2, so that the README's first line takes the path that it takes for a user.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from llmprune.errors import UserError
from llmprune.model import load
from tests.builders import tiny_model, tiny_tokenizer
from tests.loopback.hub import READ_TOKEN, WRITE_TOKEN, WRONG_TOKEN, LoopbackHub, hub
from tests.loopback.store import git_oid

pytestmark = pytest.mark.slow

FIRST_LINE = "llmprune --model gpt2 --sparsity 2:4"
SMALL = ["--num-samples", "4", "--seq-len", "32", "--eval-tokens", "256"]
TASKS = ["--eval-tasks", "lambada,piqa", "--eval-limit", "5"]
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
BASE, DEFAULT = "openai-community/gpt2", "alice/gpt2-alps-2of4"
LICENSE = b"Do what you like.\n"
CARD = "---\nlicense: mit\nlanguage: en\ntags: [tiny]\n---\n\n# A tiny GPT-2\n"


@dataclass(frozen=True)
class Desk:
    """A working directory, and a way to run commands there with the Hub in reach."""

    hub: LoopbackHub
    folder: Path

    def run(self, *command: str, code: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command; `settings` go into its environment. No token may ever be seen in what it prints."""
        scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        env = {**self.hub.env, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PATH": scripts, **settings}
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == code, done.stdout + done.stderr
        assert not any(token in done.stdout + done.stderr for token in (WRITE_TOKEN, READ_TOKEN, WRONG_TOKEN))
        return done

    def llmprune(self, *arguments: str, code: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run(sys.executable, "-m", "llmprune", *arguments, code=code, **settings)

    def report(self, directory: str) -> dict[str, Any]:
        """The report of a saved checkpoint."""
        content: dict[str, Any] = json.loads((self.folder / directory / "llmprune_report.json").read_text())
        return content


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def seed(server: LoopbackHub, folder: Path) -> None:
    """A base model with a second branch, whose weights have the other sign, and the two default data sets."""
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_bytes(LICENSE)
    (folder / "README.md").write_text(CARD)
    model = tiny_model("gpt2")
    model.save_pretrained(folder)
    server.add(BASE, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    model.save_pretrained(folder)
    server.add(BASE, folder, branch="negative")
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "a", "dog", "ran", "after", "balls"]
    texts = [" ".join(words[(7 * row + word) % len(words)] for word in range(30)) for row in range(60)]
    lines = "".join(json.dumps({"text": text, "url": "u", "timestamp": "t"}) + "\n" for text in texts)
    c4 = {"en/c4-train.00000-of-01024.json.gz": gzip.compress(lines.encode())}
    server.add("allenai/c4", c4, kind="dataset")
    splits = ("train", "validation", "test")
    wikitext = {
        f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": parquet([{"text": text} for text in texts])
        for split in splits
    }
    server.add("Salesforce/wikitext", wikitext, kind="dataset")
    items = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    lambada = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test.jsonl\n---\n"
    server.add(
        "EleutherAI/lambada_openai", {"README.md": lambada.encode(), "data/test.jsonl": items.encode()}, kind="dataset"
    )
    piqa = [
        {"goal": "to sit", "sol1": "the cat sat", "sol2": "a mat sat on a dog", "label": row % 2} for row in range(6)
    ]
    files = {f"data/{split}-00000-of-00001.parquet": parquet(piqa) for split in ("train", "validation")}
    server.add("baber/piqa", files, kind="dataset")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "desk").mkdir()
    with hub(folder) as server:
        seed(server, folder / "base")
        yield Desk(server, folder / "desk")


@pytest.fixture(scope="module")
def pushed(desk: Desk) -> subprocess.CompletedProcess[str]:
    """The README's first line with nothing added but sizes, zero-shot tasks by name and the push."""
    return desk.llmprune(*shlex.split(FIRST_LINE)[1:], *SMALL, *TASKS, "--push-to-hub")


def paths(server: LoopbackHub, since: int = 0) -> list[str]:
    return [request.path for request in server.requests[since:]]


def assert_same_files(server: LoopbackHub, repo_id: str, directory: Path, *, others: set[str]) -> None:
    """The repository holds what the directory holds, byte for byte, and `others`."""
    _, tree = server.repo(repo_id).at("main")
    local = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(tree) == {*local, *others, ".gitattributes"}
    for name, content in local.items():
        own = hashlib.sha256(content).hexdigest() if tree[name].sha256 else git_oid(content)
        assert tree[name].etag == own, name


def test_the_first_line_of_the_readme(desk: Desk, pushed: subprocess.CompletedProcess[str], repository: Path) -> None:
    assert f"    {FIRST_LINE}\n" in (repository / "README.md").read_text(encoding="utf-8")
    for expected in ("perplexity", "wikitext2 test", "50.00% of the pruned weights", "verified", DEFAULT):
        assert expected in pushed.stdout
    assert "it/s" not in pushed.stderr  # no bars of the clients among our own lines
    saved = desk.folder / "gpt2-alps-2of4"
    assert_same_files(desk.hub, DEFAULT, saved, others=set())
    titles = [commit.title for commit in desk.hub.repo(DEFAULT).commits.values()]
    assert titles == ["initial commit", "Upload a model pruned with llmprune"]  # in one: readers see all or nothing
    assert not desk.hub.repo(DEFAULT).private
    assert "/_cas/v2/shards" in paths(desk.hub)
    assert (saved / "LICENSE").read_bytes() == LICENSE
    assert not any(WRITE_TOKEN.encode() in path.read_bytes() for path in saved.iterdir())
    assert f"commit       {desk.hub.repo(DEFAULT).refs['main']}, with every file as it is here" in pushed.stdout


def test_the_card_of_the_pushed_model(desk: Desk, pushed: subprocess.CompletedProcess[str]) -> None:
    """Made from what was measured, with what the base's card says, and of a kind that the client reads back."""
    content = desk.hub.repo(DEFAULT).at("main")[1]["README.md"].content
    assert content is not None
    card, report = ModelCard(content.decode()), desk.report("gpt2-alps-2of4")
    assert card.data.base_model == "gpt2"
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert card.data.datasets == ["allenai/c4"]
    assert card.data.tags == ["pruned", "sparse", "2:4", "alps", "llmprune"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == WIKITEXT
    assert result.metric_value == round(report["after"][0]["value"], 4)
    assert f'from_pretrained("{DEFAULT}")' in card.text
    assert "--push-to-hub" in card.text
    assert f"commit `{report['source']['revision']}`" in card.text
    assert "The licence is the base model's: mit. Its licence files came along: `LICENSE`." in " ".join(
        card.text.split()
    )
    assert str(desk.folder) not in card.content


def test_the_report_names_the_commits_that_were_read(desk: Desk, pushed: subprocess.CompletedProcess[str]) -> None:
    source = desk.report("gpt2-alps-2of4")["source"]
    assert source["revision"] == desk.hub.repo(BASE).refs["main"]
    assert source["calibration"]["repo"] == "allenai/c4"
    assert source["calibration"]["revision"] == desk.hub.store.repos["dataset", "allenai/c4"].refs["main"]
    tasks = [row["provenance"] for row in desk.report("gpt2-alps-2of4")["after"] if row["kind"] == "zero_shot"]
    assert tasks == [
        {"repo": repo, "config": config, "split": split, "revision": desk.hub.store.repos["dataset", repo].refs["main"]}
        for repo, config, split in (
            ("EleutherAI/lambada_openai", "default", "test"),
            ("baber/piqa", None, "validation"),
        )
    ]
    weights = [path for path in paths(desk.hub) if path.startswith(f"/{BASE}/resolve/") and ".safetensors" in path]
    assert weights
    assert all(source["revision"] in path for path in weights)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def same(repo, directory):
    pushed, saved = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (repo, directory))
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(pushed[name], saved[name]) and pushed[name].dtype == saved[name].dtype for name in saved)
    assert AutoTokenizer.from_pretrained(repo)("a cat")["input_ids"] == [4, 30 + 10, 6, 4, 23]
    print(sum(int((tensor == 0).sum()) for tensor in pushed.values()))

same(*sys.argv[1:])
"""


def test_the_pushed_model_loads_by_its_id_bit_for_bit(
    desk: Desk, pushed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    zeros = desk.run(sys.executable, "-c", LOAD, DEFAULT, "gpt2-alps-2of4", HF_HOME=str(tmp_path)).stdout
    tensors = load_file(desk.folder / "gpt2-alps-2of4" / "model.safetensors")
    assert int(zeros) == sum(int((tensor == 0).sum()) for tensor in tensors.values()) > 10_000


def test_the_same_line_again_without_a_network(desk: Desk, pushed: subprocess.CompletedProcess[str]) -> None:
    """All comes from the cache, the commit is known, and what could not be asked is said."""
    asked = len(desk.hub.requests)
    arguments = [*shlex.split(FIRST_LINE)[1:], *SMALL, *TASKS, "--output-dir", "offline", "--quiet"]
    desk.llmprune(*arguments, HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert paths(desk.hub, asked) == []
    report = desk.report("offline")
    assert report["source"] == desk.report("gpt2-alps-2of4")["source"]
    assert any("the Hub could not be asked" in note for note in report["notes"])
    assert (desk.folder / "offline" / "LICENSE").read_bytes() == LICENSE
    online = desk.report("gpt2-alps-2of4")
    assert [row["value"] for row in report["after"]] == [row["value"] for row in online["after"]]
    assert [row["provenance"] for row in report["after"]] == [row["provenance"] for row in online["after"]]


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--revision is for models of the Hub"):
        load(str(tmp_path), revision="main")
