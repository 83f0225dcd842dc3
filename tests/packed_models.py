"""Tiny pruned models, saved dense and packed: the packed files are written here anew, as docs/packed.md has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.sparsity.masks import keep_smallest_out, nm_mask
from llmprune.sparsity.pack import as_rows, from_rows, pack
from tests.builders import FAMILIES

__all__ = ["Pair", "packed_pair"]

MORE_FAMILIES: dict[str, Callable[[], Any]] = {
    "opt": lambda: transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True
    ),
}

STAYS_DENSE = (
    "embed",
    "lm_head",
    "norm",
    "ln_",
    "router",
    "mlp.gate.",
    "block_sparse_moe.gate.",
    "wte",
    "wpe",
    "sinks",
)


@dataclass(frozen=True)
class Pair:
    """One pruned model on disk, twice; `packed_keys` says which tensors are packed."""

    dense: Path
    packed: Path
    packed_keys: tuple[str, ...]


def packed_pair(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", pattern: str | None = None
) -> Pair:
    """Make a tiny model, prune every second matrix to 2:4 and the others to 60 % zeros, and save it both ways.

    pattern : "2:4" or "any" for all matrices
    """
    dense, packed = folder / "dense", folder / "packed"
    torch.manual_seed(0)
    config = (FAMILIES | MORE_FAMILIES)[family]()
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # biases and norms start as zeros and ones; these would hide mistakes
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 10
    model.train(False).save_pretrained(dense, max_shard_size=shard)
    shutil.copytree(dense, packed)
    entries: dict[str, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    for name in sorted(file.name for file in dense.glob("*.safetensors")):
        pruned, stored = _rewritten(dense / name, family, pattern, entries)
        save_file(pruned, dense / name, {"format": "pt"})
        save_file(stored, packed / name, {"format": "pt"})
        weight_map |= dict.fromkeys(stored, name)
    index = packed / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    about = json.loads((packed / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "llmprune", "format": 1, "weights": entries}
    (packed / "config.json").write_text(json.dumps(about))
    return Pair(dense, packed, tuple(entries))


def _rewritten(
    file: Path, family: str, pattern: str | None, entries: dict[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of one file pruned, and the same packed; what was packed is added to `entries`."""
    pruned, stored = {}, {}
    with safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (no mapping)
            tensor = opened.get_tensor(key)
            if tensor.ndim < 2 or any(part in key for part in STAYS_DENSE) or "bias" in key:
                pruned[key] = stored[key] = tensor
                continue
            axis = _input_axis(key, tensor, family)
            chosen = pattern or ("2:4" if len(entries) % 2 else "any")
            rows = as_rows(tensor, axis)
            zeros = rows.shape[1] * 6 // 10
            score = rows.float().abs()
            mask = nm_mask(score, 2, 4) if chosen == "2:4" else keep_smallest_out(score, zeros)
            rows = rows.masked_fill(~mask, 0)
            packed = pack(rows, chosen)
            pruned[key] = from_rows(rows, tensor.shape, axis)
            stored[key], stored[f"{key}_index"] = packed.values, packed.index
            entries[key] = {
                "pattern": chosen,
                "shape": list(tensor.shape),
                "input_axis": axis,
                "kept": packed.values.numel(),
            }
    return pruned, stored


def _input_axis(key: str, tensor: Tensor, family: str) -> int:
    if family == "gpt2":
        return 0
    return 1 if tensor.ndim == 3 and family == "gpt_oss" else tensor.ndim - 1
