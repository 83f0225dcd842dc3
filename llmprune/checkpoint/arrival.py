"""Has the Hub got what was sent? Asked at the commit that the push made, whatever others push meanwhile.

The Hub names a large file by the sha256 of its bytes and a small one as git does, so every file can be compared
without downloading it. Then the configuration, and the header and the last megabyte of one shard are read back, as a
loader would read them: names alone would not show a storage that has lost the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import SEEK_END
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash, sha_fileobj

__all__ = ["not_arrived"]

_CONFIG = "config.json"

_END = 2**20
"""Bytes of a shard's end that are read back."""


def not_arrived(
    api: HfApi, directory: Path, repo_id: str, *, commit: str, files: Sequence[str], weights: Sequence[str]
) -> list[str]:
    """What of the `files` of `directory` the repository has not got at `commit`, one clause each.

    `weights` are the patterns of weight files, of which the repository may have no others.
    """
    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
        if isinstance(entry, RepoFile)
    }
    faults = [f"{name} is missing there" for name in files if name not in there]
    faults += [f"{name} differs" for name in files if name in there and not _is_same(directory / name, there[name])]
    stale = set(filter_repo_objects(there, allow_patterns=list(weights))) - set(files)
    faults += [f"{name}, of another push, would be loaded too" for name in sorted(stale)]
    return faults or _read_back(api, directory, repo_id, commit=commit, files=files)


def _is_same(path: Path, entry: RepoFile) -> bool:
    if path.stat().st_size != entry.size:
        return False
    if entry.lfs is None:  # small enough to be read at once
        return git_hash(path.read_bytes()) == entry.blob_id
    with path.open("rb") as file:
        return sha_fileobj(file).hex() == entry.lfs.sha256


def _read_back(api: HfApi, directory: Path, repo_id: str, *, commit: str, files: Sequence[str]) -> list[str]:
    faults = []
    with TemporaryDirectory() as scratch:
        config = Path(api.hf_hub_download(repo_id, _CONFIG, revision=commit, local_dir=scratch))
        if config.read_bytes() != (directory / _CONFIG).read_bytes():
            faults.append(f"{_CONFIG} reads back otherwise")
    shard = next((name for name in files if name.endswith(".safetensors")), None)
    if shard is not None:
        held = api.parse_safetensors_file_metadata(repo_id, shard, revision=commit)
        found = {name: (row.dtype, row.shape, row.data_offsets) for name, row in held.tensors.items()}
        if found != _header(directory / shard):
            faults.append(f"the header of {shard} reads back otherwise")
        if _end_there(api, repo_id, shard, commit=commit) != _end_here(directory / shard):
            faults.append(f"the end of {shard} reads back otherwise")
    return faults


def _end_there(api: HfApi, repo_id: str, name: str, *, commit: str) -> bytes:
    """The last bytes of a file of the repository, by a ranged read."""
    hub = HfFileSystem(endpoint=api.endpoint, token=api.token, skip_instance_cache=True)
    with hub.open(f"{repo_id}/{name}", "rb", revision=commit, cache_type="none") as file:
        return _end(file)


def _end_here(path: Path) -> bytes:
    with path.open("rb") as file:
        return _end(file)


def _end(file: Any) -> bytes:
    file.seek(0, SEEK_END)
    file.seek(max(0, file.tell() - _END))
    return bytes(file.read())


def _header(path: Path) -> dict[str, tuple[str, list[int], tuple[int, int]]]:
    """(dtype, shape, place) of every tensor: a shard begins with the length of this and then the JSON itself."""
    with path.open("rb") as file:
        rows: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    rows.pop("__metadata__", None)
    return {name: (row["dtype"], row["shape"], tuple(row["data_offsets"])) for name, row in rows.items()}
