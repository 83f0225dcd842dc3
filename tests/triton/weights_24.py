"""2:4 weights for tests, with all that makes them hard: dead and half-empty groups, and −0.0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.triton_kernels.pack_24 import pack_24


class Weight24(NamedTuple):
    """A dense weight (N, K) and its packed form."""

    dense: Tensor
    values: Tensor
    index: Tensor


def random_24(rows: int, columns: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Weight24:
    """A random weight of which every eighth kept entry is 0.0 and every eighth −0.0."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(rows, columns // 4, 4, generator=generator).to(dtype)
    kind = torch.randint(8, entries.shape, generator=generator)
    entries[kind == 0] = 0.0
    entries[kind == 1] = -0.0
    dropped = torch.rand(entries.shape, generator=generator).argsort(-1)[..., :2]
    dense = entries.scatter(-1, dropped, 0.0).view(rows, columns)
    return Weight24(dense, *pack_24(dense))
