"""What `save_pretrained` leaves behind in the source directory, and a pruned checkpoint still needs.

Files: licences (the obligation follows the derivative), custom code, processors of multimodal wrappers. Tensors: some
checkpoints hold more than the model class loads, such as the multi-token-prediction layers of DeepSeek-V3. Other
engines use them, so they come along, unpruned, in a shard of their own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from llmprune.checkpoint.base_card import LICENCE_FILES
from llmprune.checkpoint.packed import Entry, dense_tensor, index_name, packed_entries
from llmprune.checkpoint.report import TensorRecord, record
from llmprune.checkpoint.stream import INDEX, WEIGHTS

__all__ = ["Carried", "carry_over", "is_computed", "not_loaded"]

_EXTRA = "model-extra.safetensors"

_FILES = (
    "*.py",  # custom code; save_pretrained copies only what the loaded class is defined in
    *LICENCE_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.model",  # SentencePiece; transformers converts it on loading and saves only the result
)

# Constants that older releases of transformers stored and newer ones compute: causal masks and rotary frequencies.
_COMPUTED = re.compile(r"(\.attn|\.attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|\.position_ids$")


@dataclass(frozen=True)
class Carried:
    """What came along from the source."""

    files: tuple[str, ...] = ()
    """Names of the copied files."""
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    """The tensors of the extra shard, which nothing in the model loads, as the report describes them."""
    notes: tuple[str, ...] = ()
    """What could not be carried over, and why."""


def carry_over(model: PreTrainedModel, directory: Path, *, source: Path | None) -> Carried:
    """Copy from `source` what the checkpoint just saved into `directory` lacks. Existing files are never replaced."""
    if source is None or not source.is_dir():
        return Carried()
    files = tuple(_copy_files(source, directory))
    config = _read_json(source / "config.json")
    packed = packed_entries(config)
    quantized = packed is None and config.get("quantization_config") is not None
    shards = _shards(source)
    if quantized or (not shards and any(source.glob("*.bin"))):
        kind = "is quantized" if quantized else "holds no safetensors"
        return Carried(
            files, notes=(f"the source {kind}, so tensors that the model does not load, if any, stayed there",)
        )
    entries = packed or {}
    indexes = {index_name(name) for name in entries}
    names = not_loaded(model, [name for name in shards if name not in indexes])
    tensors = {name: tensor for name, tensor in _read(names, shards, entries) if not is_computed(name, tensor.ndim)}
    if tensors:
        _add_shard(directory, tensors)
    return Carried(files, {name: record(tensor, carried=True) for name, tensor in tensors.items()})


def _copy_files(source: Path, directory: Path) -> Iterator[str]:
    for pattern in _FILES:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (directory / path.name).exists():
                shutil.copyfile(path, directory / path.name)  # follows the links of a snapshot in the Hub's cache
                yield path.name


def _shards(directory: Path) -> dict[str, Path]:
    """The file of every tensor that `from_pretrained` would read there. A single file goes before an index."""
    if (directory / WEIGHTS).is_file():
        with safe_open(directory / WEIGHTS, "pt") as file:
            return dict.fromkeys(file.keys(), directory / WEIGHTS)
    index = _read_json(directory / INDEX).get("weight_map", {})
    return {name: directory / shard for name, shard in index.items() if (directory / shard).is_file()}


def not_loaded(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Names in the source that lead to no tensor of the model, by the renaming that `from_pretrained` does."""
    known = dict.fromkeys([*model.state_dict(), *(name for name, _ in model.named_buffers())], True)
    transforms = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    left: list[str] = []
    for name in sorted(names, key=dot_natural_key):  # some renamings count on this order
        loaded, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if name not in known and loaded not in known:
            left.append(name)
    return left


def _read(names: list[str], shards: Mapping[str, Path], packed: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, dense, file by file."""
    for shard in sorted({shards[name] for name in names}):
        with safe_open(shard, "pt") as file:
            for name in (name for name in names if shards[name] == shard):
                tensor = file.get_tensor(name)
                if name in packed:
                    with safe_open(shards[index_name(name)], "pt") as other:
                        tensor = dense_tensor(name, packed[name], tensor, other.get_tensor(index_name(name)))
                yield name, tensor


def is_computed(name: str, axes: int) -> bool:
    """Whether a tensor of so many axes is a constant that transformers computes, by its name."""
    # A learned bias has one axis; `attn.bias` with four is GPT-2's causal mask.
    return _COMPUTED.search(name) is not None and (axes != 1 or not name.endswith(".bias"))


def _add_shard(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write the extra shard and name it in the index.

    A single `model.safetensors` hides any index from transformers, so it becomes the first shard of one.
    """
    index = _read_json(directory / INDEX)
    if not index:
        first = directory / "model-00001-of-00001.safetensors"
        (directory / WEIGHTS).rename(first)
        with safe_open(first, "pt") as file:
            names = list(file.keys())
        index = {"metadata": {"total_size": _data_bytes(first)}, "weight_map": dict.fromkeys(names, first.name)}
    save_file(tensors, directory / _EXTRA, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index["metadata"]["total_size"] = index["metadata"].get("total_size", 0) + size
    index["weight_map"] |= dict.fromkeys(tensors, _EXTRA)
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _data_bytes(shard: Path) -> int:
    """Bytes of the tensors alone: a safetensors file begins with its header's length, 8 bytes, and the header."""
    with shard.open("rb") as file:
        return shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
