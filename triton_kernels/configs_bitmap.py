"""The settings of the bitmap product worth trying on a GPU, and what to use where nothing has been timed.

`_words.py` says how a config is written. Nothing here needs a GPU or triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar

from llmprune.triton_kernels._words import Words, parse

__all__ = ["BitmapDot", "MOST_TOKENS_BITMAP", "candidates_bitmap", "default_bitmap", "parse_bitmap"]

MOST_TOKENS_BITMAP = 64
"""For more tokens a product is bound by arithmetic, which zeros do not save."""

FILLING_PROGRAMS = 256
"""Two for each multiprocessor of a large GPU. An estimate, to be tuned."""


@dataclass(frozen=True)
class BitmapDot(Words):
    """Expand a tile of the weight in registers and multiply it on tensor cores.

    rows, tokens, inputs : of a tile; powers of two, of at least 16; inputs a multiple of 32
    parts : blocks that share the inputs of one output (split-K)
    stages : tiles on their way at once
    warps : of a block
    """

    kernel: ClassVar[str] = "bitmap_dot"
    rows: int = 64
    tokens: int = 16
    inputs: int = 128
    parts: int = 1
    stages: int = 1
    warps: int = 4


@cache
def parse_bitmap(text: str) -> BitmapDot:
    """A config from its word, see `_words.parse`."""
    return parse(text, {BitmapDot.kernel: BitmapDot})


def _tokens(M: int) -> int:
    """The tile of 16, 32 or 64 tokens that holds M."""
    return max(16, 1 << (M - 1).bit_length())


def default_bitmap(M: int, N: int, K: int) -> BitmapDot:
    """What to use where nothing has been timed: parts enough to fill a large GPU, each with two tiles or more.

    M, N, K : tokens, outputs, inputs
    """
    config = BitmapDot(tokens=_tokens(M))
    programs, tiles, parts = -(-N // config.rows), -(-K // config.inputs), 1
    while programs * parts < FILLING_PROGRAMS and parts * 4 <= tiles:
        parts *= 2
    return BitmapDot(tokens=config.tokens, parts=parts)


def candidates_bitmap(M: int, N: int, K: int) -> list[BitmapDot]:
    """The configs worth timing for this product, the default one first."""
    every = [
        BitmapDot(rows=rows, tokens=_tokens(M), inputs=inputs, parts=parts, stages=stages)
        for rows, inputs, parts, stages in product((64, 128), (64, 128), (1, 2, 4, 8), (1, 2))
        if parts * inputs <= K
    ]
    return list(dict.fromkeys([default_bitmap(M, N, K), *every]))
