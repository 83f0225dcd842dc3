"""Data sets of the Hugging Face Hub: single files by commit, whole data sets by name.

Single files come by `hf_hub_download`. `load_dataset(data_files=...)` would fetch them too, but cannot find them again
without a network (huggingface/datasets#6837). What goes wrong on the way arrives as any of half a dozen unrelated
exception types; `explained` turns them into one sentence with a cure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

# The root of its HTTP library's errors: which library that is, the Hub's client decides and re-exports.
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from llmprune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TransportError", "dataset_commit", "explained", "fetch_file", "fetch_splits"]


def fetch_file(repo: str, file: str) -> tuple[Path, str]:
    """One file of a data set, from the cache or the Hub.

    Returns
    -------
    (path, commit)
        Where the file lies, and the commit (40 hex digits) it belongs to.
    """
    from huggingface_hub import hf_hub_download

    with explained(repo):
        path = Path(hf_hub_download(repo, file, repo_type="dataset"))
    # The cache's layout is part of its contract: .../snapshots/<commit>/<file>.
    return path, path.parents[len(PurePosixPath(file).parts) - 1].name


def fetch_splits(repo: str, config: str | None) -> dict[str, Dataset]:
    """All splits of one configuration of a data set, by name."""
    import datasets

    with explained(repo, datasets.exceptions.DatasetsError):
        return dict(datasets.load_dataset(repo, config))


def dataset_commit(dataset: Dataset) -> str | None:
    """The commit a loaded data set came from: its cache names the folder after it. None for others, made elsewhere."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    return next((name for name in sorted(folders) if re.fullmatch(r"[0-9a-f]{40}", name)), None)


# The clients document no list; these are the roots of all that was seen: refused, absent, cut off, disk full,
# ill-formed id, unknown configuration. ConnectError is a TransportError and no OSError.
_EXPECTED: tuple[type[Exception], ...] = (TransportError, OSError, ValueError, RuntimeError, EntryNotFoundError)


@contextmanager
def explained(repo: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what the Hub's clients (and `more`) raise into a `UserError` about the data set `repo`."""
    try:
        yield
    except (*_EXPECTED, *more) as error:
        raise UserError(_sentence(repo, error)) from error


def _sentence(repo: str, error: BaseException) -> str:
    """What happened, most telling cause first. `datasets` tells a refusal or an absence in words only."""
    causes = _causes(error)

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if met(GatedRepoError) or "gated dataset" in str(error):
        return (
            f"data set {repo!r} is gated: accept its terms at https://huggingface.co/datasets/{repo}, "
            "then log in with `hf auth login`."
        )
    if met(RemoteEntryNotFoundError):
        return f"data set {repo!r} no longer holds the file that llmprune reads ({_first_line(error)})."
    if met(OfflineModeIsEnabled, ConnectionError, LocalEntryNotFoundError) or (
        met(TransportError) and not met(HfHubHTTPError)
    ):
        return (
            f"data set {repo!r} is not in the cache and the Hub could not be reached ({_first_line(causes[-1])}). "
            "Connect to the network (unset HF_HUB_OFFLINE if it is set), or give a local file or 'demo' as data set."
        )
    if met(RepositoryNotFoundError) or "doesn't exist on the Hub" in str(error):
        return (
            f"data set {repo!r} does not exist on the Hub, or your token may not see it. "
            "Check the spelling; for a private one log in with `hf auth login`."
        )
    return (
        f"data set {repo!r} could not be loaded: {type(error).__name__}: {_first_line(error)} "
        "(A configuration is chosen by writing owner/name:config.)"
    )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that led to it, outermost first."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    return chain


def _first_line(error: BaseException, limit: int = 240) -> str:
    """The error's text on one line, cut to about three lines of a terminal."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
