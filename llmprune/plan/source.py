"""What a model's files say of themselves: its configuration and the headers of its weights, never the weights.

A safetensors file begins with a list of its tensors. From a directory that is a few kilobytes to read, from the Hub a
request for the first bytes of every file. A GGUF file holds the configuration; its weights become float32 in a run.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import AutoConfig

from llmprune.errors import UserError
from llmprune.model import quiet_transformers
from llmprune.model.load import dequantization, is_packed, located, snapshot, told_clearly

__all__ = ["DEQUANTIZED", "Source", "Stored", "read_source"]

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""dtypes that a model is computed in, by their names in headers."""


DEQUANTIZED = "dequantized"
"""Why weights are converted: their files hold another form of them."""


KINDS_BY_NAME = {str(kind).removeprefix("torch."): kind for kind in KINDS.values()}


@dataclass(frozen=True)
class Stored:
    """A tensor as a header has it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Source:
    """A model before its weights are read.

    config : of transformers, without a quantization that a run undoes
    dtype : in which a run would hold the weights
    stored : by name, the tensors of its files; None where there are no headers to read
    file_bytes : of all files with weights; None where they cannot be known
    converted : why all weights take memory of their own as soon as they are loaded, where files cannot just be mapped
    """

    name: str
    config: Any
    dtype: torch.dtype
    stored: dict[str, Stored] | None
    file_bytes: int | None
    converted: str | None = None
    notes: tuple[str, ...] = ()


def read_source(name: str, *, revision: str | None, dtype: str, trust_remote_code: bool) -> Source:
    """Read what is known of a model without its weights; arguments as `llmprune.model.load` takes them.

    Raises
    ------
    UserError
        if there is no such model, it needs trust_remote_code, or its quantization cannot be undone.
    """
    path = located(name, revision, dtype)
    if path.suffix == ".gguf":
        return _read_gguf(path, name, dtype)
    with told_clearly(name), quiet_transformers():
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        directory = path if path.is_dir() else snapshot(name, revision)
        metadata = _headers(name, directory, commit=None if path.is_dir() else directory.name)
        plain = not dequantization(config, name) and not is_packed(config)
    return _described(name, config, dtype, metadata, plain=plain)


def _described(name: str, config: Any, dtype: str, metadata: Any, *, plain: bool) -> Source:
    stored, size = (None, None) if metadata is None else _listed(metadata)
    kind = _dtype(config, dtype, stored)
    converted = None if plain else DEQUANTIZED
    if plain and stored is not None and _mostly_other(stored, kind):
        converted = f"converted to {str(kind).removeprefix('torch.')}"
    notes: tuple[str, ...] = ()
    if stored is None:
        converted = "read from files that are not safetensors"
        notes = (f"{name} has no safetensors, so sizes are those of its configuration",)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return Source(name, config, kind, stored, size, converted, notes)


def _read_gguf(path: Path, name: str, dtype: str) -> Source:
    with told_clearly(name), quiet_transformers(), redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    kind = KINDS_BY_NAME.get(dtype, torch.float32)
    return Source(name, config, kind, None, path.stat().st_size, DEQUANTIZED)


def _headers(name: str, directory: Path, *, commit: str | None) -> Any:
    """The headers of a directory, of a snapshot that is in the cache already, or of a repository; None without any."""
    try:
        return get_local_safetensors_metadata(directory)
    except (NotASafetensorsRepoError, FileNotFoundError):
        if commit is None:
            if any(directory.glob("*.safetensors.index.json")):
                raise UserError(
                    f"--model {name}: a file that its index names is missing: get the files again."
                ) from None
            return None
    except SafetensorsParsingError as error:
        raise UserError(f"--model {name} has a damaged file of weights ({error}): get the file again.") from error
    return _remote_headers(name, commit)


def _remote_headers(name: str, commit: str | None) -> Any:
    bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return HfApi().get_safetensors_metadata(name, revision=commit)
    except NotASafetensorsRepoError:
        return None
    finally:
        if bars:
            enable_progress_bars()


def _listed(metadata: Any) -> tuple[dict[str, Stored], int]:
    """All tensors of a set of headers, and the bytes of the files, the headers themselves taken as they are written."""
    stored = {
        name: Stored(tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return stored, sum(tensor.nbytes for tensor in stored.values())


def _mostly_other(stored: dict[str, Stored], kind: torch.dtype) -> bool:
    other = sum(tensor.nbytes for tensor in stored.values() if KINDS.get(tensor.dtype, kind) != kind)
    return 2 * other > sum(tensor.nbytes for tensor in stored.values())


def _dtype(config: Any, asked: str, stored: dict[str, Stored] | None) -> torch.dtype:
    """What `from_pretrained` would load in: what was asked for, what the configuration says, or the first weight's."""
    if asked != "auto":
        return KINDS_BY_NAME[asked]
    said = getattr(config, "dtype", None)
    if said is not None:
        return KINDS_BY_NAME.get(str(said).removeprefix("torch."), torch.float32)
    return next((KINDS[tensor.dtype] for tensor in (stored or {}).values() if tensor.dtype in KINDS), torch.float32)
