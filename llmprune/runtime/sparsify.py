"""A dense model's linears packed in memory, and a packed model's made dense again; one linear at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llmprune.runtime.placement import input_axis_of, sparse_linears
from llmprune.runtime.sparse_linear import SparseLinear
from llmprune.sparsity.pack import as_rows, find_pattern, pack

__all__ = ["densify", "sparsify"]


def sparsify(model: nn.Module, patterns: Iterable[str] = ("2:4", "4:8")) -> int:
    """Put a SparseLinear in the place of every linear that takes less memory packed; returns how many.

    patterns : N:M to look for; a weight that has none of them is packed as "any"

    The embeddings' own matrix stays as it is where the output shares it.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done = 0
    module: Any  # no list of modules is held: each would keep its weight until the last is done
    for name in [name for name, module in model.named_modules() if input_axis_of(module) is not None]:
        module = model.get_submodule(name)
        axis = input_axis_of(module)
        if axis is None or id(module.weight) in shared:
            continue
        with torch.no_grad():
            rows = as_rows(module.weight.data, axis)
            packed = pack(rows, find_pattern(rows, patterns))
        if packed.nbytes >= module.weight.nbytes:
            continue
        sparse = SparseLinear.from_packed(packed, module.bias, input_axis=axis)
        model.set_submodule(name, sparse.train(module.training))
        done += 1
    return done


def densify(model: nn.Module) -> None:
    """Put a plain linear in the place of every SparseLinear, with the same weight bit for bit."""
    for name in list(sparse_linears(model)):  # names alone: a list of modules would keep all packed weights too
        module = model.get_submodule(name)
        assert isinstance(module, SparseLinear)
        model.set_submodule(name, _plain(module).train(module.training))


def _plain(module: SparseLinear) -> nn.Module:
    """nn.Linear, or GPT-2's Conv1D where the weight was stored transposed."""
    from transformers.pytorch_utils import Conv1D

    sizes = (module.in_features, module.out_features)
    with torch.device("meta"):
        made: Any = nn.Linear(*sizes, bias=False) if module.input_axis == 1 else Conv1D(*sizes[::-1])
    dense = module.dense()
    made.weight = nn.Parameter(dense if module.input_axis == 1 else dense.T.contiguous())
    made.bias = module.bias
    plain: nn.Module = made
    return plain
