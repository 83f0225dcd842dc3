"""Which kernels can multiply with a 2:4 weight, and the settings worth trying on a GPU.

A config is one kernel with its settings; `_words.py` says how it is written. Nothing here needs a GPU or triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar

import torch

from llmprune.triton_kernels._words import Words, parse

__all__ = ["Config24", "ExpandDot", "Gemv", "Mma", "Shape24", "candidates_24", "default_24", "parse_24"]

HALF_TYPES = (torch.bfloat16, torch.float16)

MMA_CAPABILITY = (8, 0)
"""Sparse tensor cores came with the A100."""


MANY_WARPS = 16384
"""No GPU of today has more than about 10 000 warps at once, so beyond this number splitting finds no idle ones."""


REGISTERS, MOST_REGISTERS = 65536, 224
"""Of 32 bits: what the threads of a block share, and what one may have (255, less what is needed besides)."""


@dataclass(frozen=True)
class Shape24:
    """A product: M tokens, a weight (N, K) of `dtype`, on a GPU of this compute capability (None: not known)."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Mma(Words):
    """Sparse tensor cores, for up to 8 · token_tiles tokens at a time.

    warps : of a block, each with its own share of the inputs
    row_tiles : tiles of 16 outputs in a block
    token_tiles : tiles of 8 tokens in a block
    unroll : steps of 64 inputs that a warp loads ahead
    parts : blocks that share the inputs of one output (split-K)
    ordered : bring x into the lanes' order first (a launch more, a quarter of the loads)
    """

    kernel: ClassVar[str] = "mma"
    warps: int = 8
    row_tiles: int = 1
    token_tiles: int = 1
    unroll: int = 4
    parts: int = 1
    ordered: bool = False

    def refusal(self, shape: Shape24) -> str | None:
        """Why it cannot do this product; None if it can."""
        if shape.dtype not in HALF_TYPES:
            return f"needs bfloat16 or float16; got {shape.dtype}"
        if shape.capability is not None and shape.capability < MMA_CAPABILITY:
            return f"needs sparse tensor cores, compute capability 8.0 or more; got {shape.capability}"
        if shape.K % 64 or shape.N % (16 * self.row_tiles):
            return f"needs K a multiple of 64 and N of {16 * self.row_tiles}; got N={shape.N}, K={shape.K}"
        return None


class _Portable(Words):
    """A kernel in plain Triton, for any GPU."""

    def refusal(self, shape: Shape24) -> str | None:
        """Why it cannot do this product; None if it can."""
        if shape.dtype not in HALF_TYPES:
            return f"needs bfloat16 or float16; got {shape.dtype}"
        if shape.K % 16:
            return f"needs K a multiple of 16; got K={shape.K}"
        return None


@dataclass(frozen=True)
class Gemv(_Portable):
    """Multiply and add without tensor cores, for a few tokens.

    rows : outputs of a block; a power of two, up to 32 · warps
    tokens : tokens of a block
    unroll : chunks of 16 inputs that a thread loads ahead
    parts : blocks that share the inputs of one output (split-K)
    warps : of a block
    """

    kernel: ClassVar[str] = "gemv"
    rows: int = 1
    tokens: int = 1
    unroll: int = 4
    parts: int = 1
    warps: int = 2

    @property
    def chunks(self) -> int:
        """Chunks of a row that the block takes in a step: one for each thread."""
        return 32 * self.warps // self.rows


@dataclass(frozen=True)
class ExpandDot(_Portable):
    """Expand a tile of the weight in registers and multiply it on dense tensor cores.

    rows, tokens, inputs : of a tile; powers of two, of at least 16
    parts : blocks that share the inputs of one output (split-K)
    stages : tiles on their way at once
    warps : of a block
    """

    kernel: ClassVar[str] = "expand_dot"
    rows: int = 64
    tokens: int = 16
    inputs: int = 128
    parts: int = 1
    stages: int = 3
    warps: int = 4


Config24 = Mma | Gemv | ExpandDot
_KERNELS: dict[str, type[Config24]] = {config.kernel: config for config in (Mma, Gemv, ExpandDot)}


@cache
def parse_24(text: str) -> Config24:
    """A config from its word, see `_words.parse`."""
    return parse(text, _KERNELS)


def _tiles(count: int, size: int, most: int) -> int:
    """The power of two, up to `most`, of tiles that cover `count`, or as many as allowed."""
    tiles = 1
    while tiles * size < count and tiles < most:
        tiles *= 2
    return tiles


def default_24(shape: Shape24) -> Config24:
    """What to use where nothing has been timed.

    Raises
    ------
    ValueError : if no kernel can do this product
    """
    choices: tuple[Config24, ...] = (_default_mma(shape), _default_portable(shape))
    for config in choices:
        if config.refusal(shape) is None:
            return config
    raise ValueError(
        f"no 2:4 kernel fits: the most general one {config.refusal(shape)}; "
        "expand the weight with decompress_24 and multiply as usual"
    )


def _default_mma(shape: Shape24) -> Mma:
    """As many warps as there are inputs for, up to 16; no split, which costs a second launch."""
    token_tiles = _tiles(shape.M, 8, 8)
    unroll = 2 if token_tiles <= 2 else 1
    most = 16 if token_tiles == 1 else 8
    warps = _tiles(shape.K // 64, 2 * unroll, most)
    return Mma(warps=warps, token_tiles=token_tiles, unroll=unroll, ordered=token_tiles > 1)


def _default_portable(shape: Shape24) -> Gemv | ExpandDot:
    if shape.M <= 4:
        return Gemv(tokens=_tiles(shape.M, 1, 4), warps=_tiles(shape.K // 64, 32, 8))
    return ExpandDot(tokens=16 * _tiles(shape.M, 16, 4))


def candidates_24(shape: Shape24) -> list[Config24]:
    """The configs worth timing for this product, the default one first; none if no kernel fits."""
    every: list[Config24] = [
        *(_default_mma(shape), _default_portable(shape)),
        *_mma_candidates(shape),
        *_gemv_candidates(shape),
        *_expand_dot_candidates(shape),
    ]
    return list(dict.fromkeys(config for config in every if config.refusal(shape) is None))


def _mma_candidates(shape: Shape24) -> list[Mma]:
    """All whose warps have work and whose numbers fit into registers; split only where warps would be idle."""
    most = _tiles(shape.M, 8, 8)
    found = []
    for warps, row_tiles, unroll, parts in product((4, 8, 16), (1, 2), (1, 2, 4), (1, 2, 4)):
        for token_tiles in (8, 4) if most == 8 else (most,):
            # Registers of a thread: accumulators, and what a round has loaded of x, values and index.
            waiting = unroll * (8 * token_tiles + 9 * row_tiles)
            registers = 4 * row_tiles * token_tiles + waiting + 40
            fits = registers <= MOST_REGISTERS and registers * 32 * warps <= REGISTERS
            steps = shape.K // 64 / (warps * parts * unroll)
            idle = shape.N // (16 * row_tiles) * warps * parts <= MANY_WARPS
            if fits and steps >= 1 and waiting >= 34 and (parts == 1 or idle):
                found.append(Mma(warps, row_tiles, token_tiles, unroll, parts, ordered=token_tiles > 1))
    return sorted(found, key=str)


def _gemv_candidates(shape: Shape24) -> list[Gemv]:
    if shape.M > 4:
        return []
    tokens = _tiles(shape.M, 1, 4)
    every = [
        Gemv(rows, tokens, unroll, parts, warps)
        for rows, unroll, parts, warps in product((1, 2, 4, 8), (2, 4), (1, 4), (4, 8))
    ]
    return [config for config in every if 16 * config.chunks * config.unroll * config.parts <= shape.K]


def _expand_dot_candidates(shape: Shape24) -> list[ExpandDot]:
    if shape.M <= 2:
        return []
    tokens = 16 * _tiles(shape.M, 16, 8)
    return [
        ExpandDot(rows=rows, tokens=tokens, inputs=inputs, parts=parts, stages=stages)
        for rows, inputs, parts, stages in product((64, 128), (64, 128), (1, 4), (3, 4))
        if (parts == 1 or inputs * parts <= shape.K) and rows * tokens <= 128 * 64
    ]
