"""What bench_kernels measures: the registry of products with a weight, and how one is timed.

To add a kernel: a row in `CANDIDATES`. Dense rows are the baselines that the others are divided by. Products on a GPU
have their registry in gpu_candidates.py and are timed by gpu_check, because there a clock in Python measures launches.

Weights are rotated: each candidate gets so many copies of its own that they exceed the largest cache three times over,
and one pass multiplies with each of them once, as a model does. All candidates of a case take turns in every round, so
that a machine that slows down slows all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.errors import UserError
from llmprune.runtime import cpu
from llmprune.sparsity.masks import keep_smallest_out, nm_mask
from llmprune.sparsity.pack import ANY, pack, row_starts
from llmprune.sparsity.pattern import NM, parse_pattern

__all__ = ["CANDIDATES", "Candidate", "Case", "Measurement", "largest_cache", "measure"]

Product = Callable[[Tensor], Tensor]

LONG_ENOUGH = 0.02
"""Seconds that one look at the clock should cover; short passes are repeated."""

MOST_COPIES = 512
"""A matrix so small that this many fit into the cache is there for the overhead of a call."""

LARGEST_ERROR = 0.02
"""Relative root mean square error against float64 above which nothing is timed."""


@dataclass(frozen=True)
class Case:
    """One product: a weight (rows, columns) with a pattern, and a number of tokens."""

    rows: int
    columns: int
    pattern: str
    tokens: int = 1

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Random, with the pattern; the same every time."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.rows, self.columns, generator=generator)
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, NM):
            mask = nm_mask(weight.abs(), pattern.n, pattern.m)
        else:
            zeros = round(pattern.sparsity * weight.numel())
            mask = keep_smallest_out(weight.abs().flatten(), zeros).view_as(weight)
        return weight.masked_fill(~mask, 0).to(dtype)  # weight * mask would leave −0.0, which is kept

    def x(self, dtype: torch.dtype) -> Tensor:
        """(tokens, columns)."""
        return torch.randn(self.tokens, self.columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@dataclass(frozen=True)
class Candidate:
    """One way to multiply.

    prepare : a dense weight that has the pattern (rows, columns) and the pattern → the product with it
    bytes : of one prepared weight, from (rows, columns, kept entries)
    """

    name: str
    device: str
    dtype: torch.dtype
    prepare: Callable[[Tensor, str], Product]
    bytes: Callable[[int, int, int], int]
    dense: bool = False
    x_dtype: torch.dtype | None = None


def _dense(weight: Tensor, pattern: str) -> Product:
    mine = weight.clone()
    return lambda x: F.linear(x, mine)


def _cpu_kernel(weight: Tensor, pattern: str) -> Product:
    packed = pack(weight, pattern if ":" in pattern else ANY)
    starts = row_starts(packed.index) if packed.pattern == ANY else None
    values, index, in_features = packed.values, packed.index, packed.in_features
    return lambda x: cpu.matmul(x, values, index, starts=starts, bias=None, in_features=in_features)


def _cpu_expand(weight: Tensor, pattern: str) -> Product:
    packed = pack(weight, pattern if ":" in pattern else ANY)
    starts = row_starts(packed.index) if packed.pattern == ANY else None
    out = _scratch(weight)
    values, index, in_features = packed.values, packed.index, packed.in_features
    return lambda x: F.linear(x, cpu.expand(values, index, starts=starts, in_features=in_features, out=out))


_SCRATCH: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


def _scratch(weight: Tensor) -> Tensor:
    """One buffer for all copies, as in the runtime."""
    return _SCRATCH.setdefault((weight.shape, weight.dtype), torch.empty_like(weight))


def _packed_bytes(size: int) -> Callable[[int, int, int], int]:
    return lambda rows, columns, kept: kept * size + rows * -(-columns // 8)


def _dense_bytes(size: int) -> Callable[[int, int, int], int]:
    return lambda rows, columns, kept: rows * columns * size


CANDIDATES = [
    Candidate("torch bf16", "cpu", torch.bfloat16, _dense, _dense_bytes(2), dense=True),
    Candidate("torch fp32", "cpu", torch.float32, _dense, _dense_bytes(4), dense=True),
    Candidate("packed bf16", "cpu", torch.bfloat16, _cpu_kernel, _packed_bytes(2)),
    Candidate("packed bf16, x fp32", "cpu", torch.bfloat16, _cpu_kernel, _packed_bytes(2), x_dtype=torch.float32),
    Candidate("packed fp32", "cpu", torch.float32, _cpu_kernel, _packed_bytes(4)),
    Candidate("expand + torch bf16", "cpu", torch.bfloat16, _cpu_expand, _packed_bytes(2)),
]


@dataclass
class Measurement:
    """Microseconds of one product, in every round."""

    candidate: str
    dense: bool
    copies: int
    error: float
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Microseconds."""
        return statistics.median(self.rounds)


def largest_cache() -> int:
    """Bytes of the largest cache of the first CPU; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    found = [int(text[:-1]) * units[text[-1]] for text in (file.read_text().strip() for file in sizes)]
    return max(found, default=2**25)


def measure(case: Case, candidates: Sequence[Candidate], *, rounds: int, cache: int) -> list[Measurement]:
    """Time the candidates on one case, in turns, after checking that each of them computes the product.

    Raises
    ------
    UserError
        if one computes something else.
    """
    passes, results = [], []
    for candidate in candidates:
        timed, result = _prepared(case, candidate, cache)
        passes.append(timed)
        results.append(result)
    for turn in range(rounds):
        for i in range(len(candidates)):
            which = (i + turn) % len(candidates)
            results[which].rounds.append(passes[which]())
    return results


def _prepared(case: Case, candidate: Candidate, cache: int) -> tuple[Callable[[], float], Measurement]:
    """A function that makes one pass over all copies and gives the microseconds of one product."""
    weight, x = case.weight(candidate.dtype), case.x(candidate.x_dtype or candidate.dtype)
    one = candidate.bytes(case.rows, case.columns, int(weight.count_nonzero()))
    copies = min(MOST_COPIES, max(2, math.ceil(3 * cache / max(1, one))))
    products = [candidate.prepare(weight, case.pattern) for _ in range(copies)]
    error = _error(products[0](x), x.double() @ weight.double().T)
    if not error <= LARGEST_ERROR:
        raise UserError(f"{candidate.name} computes something else for {case}: relative error {error:.3g}.")

    def one_pass() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            for product in products:
                product(x)
        return (time.perf_counter() - start) / (repeats * copies) * 1e6

    repeats = 1
    repeats = max(1, math.ceil(LONG_ENOUGH * 1e6 / (one_pass() * copies)))
    return one_pass, Measurement(candidate.name, candidate.dense, copies, error)


def _error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())
