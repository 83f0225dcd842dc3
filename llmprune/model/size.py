"""How large a model's files are, before any of them is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

__all__ = ["stored_bytes"]

_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


def stored_bytes(name: str, revision: str | None = None) -> int | None:
    """Bytes of the files with weights of a hub id, a directory or a `.gguf` file; None where nobody can tell."""
    path = Path(name)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return _total((file.name, file.stat().st_size) for file in path.iterdir() if file.is_file())
    try:
        known = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or ()
        return _total((file.rfilename, file.size or 0) for file in known)
    except (_HTTPError, OSError, ValueError):  # out of reach, or no hub id at all: loading will say so
        return _in_cache(name, revision)


def _in_cache(name: str, revision: str | None) -> int | None:
    try:
        snapshot = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=True)).parent
    except (LocalEntryNotFoundError, ValueError):
        return None
    return _total((file.name, file.stat().st_size) for file in snapshot.iterdir() if file.is_file())


def _total(files: Iterator[tuple[str, int]]) -> int | None:
    """Of the files that transformers loads; where none is named so, of all safetensors or else all pickled ones."""
    sizes = {name: size for name, size in files if "/" not in name}
    whole = r"(-\d+-of-\d+)?"
    for kind in (rf"model{whole}\.safetensors", rf"pytorch_model{whole}\.bin", r".*\.safetensors", r".*\.bin"):
        found = [size for name, size in sizes.items() if re.fullmatch(kind, name)]
        if found:
            return sum(found)
    return None
