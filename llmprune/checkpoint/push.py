"""A saved checkpoint to the Hub, and the proof that it arrived.

    make the repository (branch, pull request) ─► one commit: files up, older weights out ─► compare what is there

A saved model is never lost to a failed push: it stays where it was saved, and the error says which command sends it
again (what has arrived is not sent twice). The commit that brings the new weights deletes older weight files of the
repository, because a leftover `model.safetensors` would be loaded in place of new shards, without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmprune.checkpoint.arrival import not_arrived
from llmprune.checkpoint.card import CARD, is_generated, refresh_card
from llmprune.checkpoint.hub import Destination, limit_patience
from llmprune.checkpoint.refusal import translated
from llmprune.errors import HubError

__all__ = ["Pushed", "push"]

MESSAGE = "Upload a model pruned with llmprune"

IGNORED = [".*", "*/.*", "*.tmp", "**/__pycache__/**", "__pycache__/**"]
"""Files that stay at home."""

OLD_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
"""Files that a push removes from the repository where it does not bring them anew."""

_NAMED = 3  # how many files an error names


@dataclass(frozen=True)
class Pushed:
    """A checkpoint that arrived.

    url : of the repository, the branch or the pull request
    commit : id of the commit that holds it, for `from_pretrained(…, revision=commit)`
    files : how many were compared with the local ones
    """

    url: str
    commit: str
    files: int


def push(
    directory: Path, to: Destination, *, token: str | None = None, say: Callable[[str], None] = lambda _: None
) -> Pushed:
    """Upload the checkpoint in `directory`, compare every file with what the Hub then has, and read it back.

    Nothing is committed where nothing would change, and no pull request is opened.

    `say` is told what a person should know. The card in `directory`, if llmprune wrote it, gets the repository's name;
    in a repository whose card somebody else wrote, that card stays, and `say` is told.

    Raises
    ------
    HubError
        if the Hub refuses or breaks off, or has not got what was sent. The directory keeps everything.
    """
    patience = "; a storage that does not answer is given up after a minute" if limit_patience() else ""
    api = HfApi(token=token)
    with translated(*_sentence(directory, to), token), _without_bars():
        home = str(api.create_repo(to.repo_id, private=to.private, exist_ok=True))
        refresh_card(directory, name=to.repo_id)
        if to.create_pr and (done := _on_main_already(api, directory, to.repo_id, home)) is not None:
            say(f"{to.repo_id} has all of this on main already, so no pull request was opened.")
            return done
        revision, url = _branch(api, to, home)
    to = replace(to, revision=revision, create_pr=False)  # a second try goes on in the same pull request
    with translated(*_sentence(directory, to), token):
        files, ignored = _outgoing(api, directory, to.repo_id, revision)
        if CARD in ignored:
            say(f"{to.repo_id} has a {CARD} that llmprune did not write; it stays. Ours is in {directory / CARD}.")
        size = sum((directory / name).stat().st_size for name in files)
        say(f"Sending {len(files)} files, {size / 1e6:,.1f} MB, to {to.repo_id}{patience}.")
        with nullcontext() if sys.stderr.isatty() else _without_bars():  # LFS draws them into log files too
            sent = api.upload_folder(
                repo_id=to.repo_id,
                folder_path=directory,
                commit_message=MESSAGE,
                revision=revision,
                ignore_patterns=ignored,
                delete_patterns=OLD_WEIGHTS,
            )
        faults = _faults(api, directory, to.repo_id, commit=sent.oid, files=files)
    if faults:
        what, cure = _sentence(directory, to)
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise HubError(f"{what}: commit {sent.oid} is not what was sent, {', '.join(faults[:_NAMED])}{more}; {cure}.")
    return Pushed(url, sent.oid, len(files))


def _on_main_already(api: HfApi, directory: Path, repo_id: str, home: str) -> Pushed | None:
    """What is on main, if it is what a push would bring there: a pull request would be an empty one."""
    files, _ = _outgoing(api, directory, repo_id, None)
    commit = str(api.repo_info(repo_id).sha)
    return None if _faults(api, directory, repo_id, commit=commit, files=files) else Pushed(home, commit, len(files))


def _outgoing(api: HfApi, directory: Path, repo_id: str, revision: str | None) -> tuple[list[str], list[str]]:
    """(files to send, patterns of those that stay at home), a card of ours among these where a person wrote one."""
    ignored = list(IGNORED)
    with _without_bars():
        if _has_own_card(api, repo_id, revision) and is_generated(directory / CARD):
            ignored.append(CARD)
    return sorted(filter_repo_objects(_files(directory), ignore_patterns=ignored)), ignored


def _faults(api: HfApi, directory: Path, repo_id: str, *, commit: str, files: list[str]) -> list[str]:
    with _without_bars():
        return not_arrived(api, directory, repo_id, commit=commit, files=files, weights=OLD_WEIGHTS)


def _sentence(directory: Path, to: Destination) -> tuple[str, str]:
    """(what failed, how to go on)."""
    cure = f"the model is safe in {directory}; send it again with `{to.command(directory)}`"
    return f"The push to {to.repo_id} failed", cure


def _branch(api: HfApi, to: Destination, home: str) -> tuple[str | None, str]:
    """(revision to commit to, address to look at), made if it is to be and does not exist."""
    if to.create_pr:
        # Opened here and not by the upload, which would open another one at every try.
        opened = api.create_pull_request(to.repo_id, title=MESSAGE, description="Pushed with `llmprune push`.")
        return opened.git_reference, opened.url
    if to.revision in (None, "main"):
        return None, home
    assert to.revision is not None
    if not to.revision.startswith("refs/"):
        api.create_branch(to.repo_id, branch=to.revision, exist_ok=True)
    return to.revision, f"{home}/tree/{to.revision}"


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a person wrote, or edited, the repository's card."""
    if not api.file_exists(repo_id, CARD, revision=revision):
        return False
    with TemporaryDirectory() as scratch:  # not into the cache: it is read once
        return not is_generated(Path(api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=scratch)))


@contextmanager
def _without_bars() -> Iterator[None]:
    """For small files, a bar is only another line."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _files(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
