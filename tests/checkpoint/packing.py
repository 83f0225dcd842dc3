"""Checkpoints to pack, and how to look into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.checkpoint.layout import fingerprint, saved_ties
from llmprune.checkpoint.report import Report, describe_tensors, totals
from llmprune.checkpoint.save import write
from tests.builders import tiny_model
from tests.checkpoint.pruning import prune_by_hand

__all__ = ["UP", "config_of", "pruned_checkpoint", "same_bits", "spoil", "tensors_of"]

UP = "model.layers.1.mlp.up_proj.weight"


def pruned_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    negative_zeros: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """2:4, with a report. Pruning by hand leaves −0.0 behind, which the format keeps as an entry."""
    model = tiny_model(family, dtype)
    before = fingerprint(model)
    pruned = prune_by_hand(model)
    if not negative_zeros:
        for name in {row.parameter for row in pruned}:
            model.get_parameter(name).data += 0.0
    directory.mkdir(parents=True)
    write(model, None, directory, source=None, max_shard_size=max_shard_size, provenance={"a": 1})
    tensors = describe_tensors(model, pruned, before=before)
    Report(
        versions={},
        command="",
        config={},
        source={},
        pruned=tuple(pruned),
        skipped=(),
        totals=totals(pruned, tensors),
        tensors=tensors,
        ties=saved_ties(model),
    ).write(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return held


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    pairs = [(one[name], other[name]) for name in one]
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def spoil(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
