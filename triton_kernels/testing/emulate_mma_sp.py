"""Run a Gluon kernel's own source on the CPU, with a lane-by-lane model of `mma.sp.m16n8k32`.

Triton's interpreter knows neither Gluon nor inline PTX. A kernel of ours that needs both is a Python function over a
few names of `gl`, so it is called here with a `gl` that computes on torch tensors: every address, mask, register and
instruction text is the kernel's own. What a warp does in hardware is modelled where `mma.sp` is issued, from the
fragment rules of the PTX manual. Loads outside a buffer and index words that the manual leaves undefined are errors.

For this a kernel's tensors have lanes and registers as their last two axes, which its layout must promise.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

__all__ = ["EmulatedKernel", "Pointer", "mma_sp", "run_kernel"]

_MMA = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(bf16|f16)\.\1\.f32 "
    r"\{(.+?)\}, \{(.+?)\}, \{(.+?)\}, \{(.+?)\}, \$(\d+), 0x([01]);"
)
_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4


class Pointer:
    """An address, or a tensor of addresses, in one buffer."""

    def __init__(self, buffer: Tensor, offset: Tensor | int = 0) -> None:
        self.buffer = buffer.view(-1)
        self.offset = offset

    def __add__(self, more: Tensor | int) -> Pointer:
        return Pointer(self.buffer, self.offset + more)

    @property
    def dtype(self) -> Pointer:
        """Stands for the pointer type of Triton, which knows its element type."""
        return self

    @property
    def element_ty(self) -> torch.dtype:
        """The dtype of what it points to."""
        return self.buffer.dtype

    def places(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(offsets, mask) of one shape; masked offsets are 0.

        Raises
        ------
        IndexError : if an address that is not masked lies outside the buffer
        """
        offsets = torch.as_tensor(self.offset)
        offsets, ok = torch.broadcast_tensors(offsets, torch.tensor(True) if mask is None else mask)
        wrong = ok & ((offsets < 0) | (offsets >= self.buffer.numel()))
        if wrong.any():
            raise IndexError(f"address {int(offsets[wrong][0])} of a buffer of {self.buffer.numel()}")
        return offsets.where(ok, 0), ok


class _Language:
    """The names of `gl` that our kernels use, on torch tensors, for one block of threads."""

    float32, int64 = torch.float32, torch.int64

    def __init__(self, gl: Any, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.SliceLayout = gl.SliceLayout
        self._blocked_layout, self._program, self._grid = gl.BlockedLayout, program, grid

    def BlockedLayout(self, registers: list[int], lanes: list[int], warps: list[int], order: list[int]) -> Any:  # noqa: N802
        """The layout itself, if its last axes are 32 lanes and 4 registers in a row."""
        rank = len(order)
        assert registers[-2:] == [1, 4], registers
        assert [*lanes] == [1] * (rank - 2) + [32, 1], lanes
        assert warps[1:] == [1] * (rank - 1), warps
        assert order[0] == rank - 1, order
        return self._blocked_layout(registers, lanes, warps, order)

    def program_id(self, axis: int) -> int:
        return self._program[axis]

    def num_programs(self, axis: int) -> int:
        return self._grid[axis]

    @staticmethod
    def static_range(*bounds: int) -> range:
        return range(*bounds)

    @staticmethod
    def arange(start: int, end: int, layout: object) -> Tensor:
        return torch.arange(start, end)

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: object) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @staticmethod
    def minimum(a: Tensor, b: int) -> Tensor:
        return a.clamp(max=b)

    @staticmethod
    def sum(tensor: Tensor, axis: int) -> Tensor:
        return tensor.sum(axis)

    @staticmethod
    def load(pointer: Pointer, mask: Tensor | None = None, other: Any = 0, **hints: object) -> Tensor:
        offsets, ok = pointer.places(mask)
        return pointer.buffer[offsets].where(ok, getattr(other, "value", other))

    @staticmethod
    def store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        offsets, ok = pointer.places(mask)
        offsets, ok, value = torch.broadcast_tensors(offsets, ok, value)
        pointer.buffer[offsets[ok]] = value[ok]

    @staticmethod
    def inline_asm_elementwise(text: Any, constraints: Any, tensors: list[Tensor], **options: Any) -> Tensor:
        """The `mma.sp` instructions of the text, one after the other, on 4 registers of each tensor."""
        assert options["pack"] == 4, "one lane's registers are the last axis"
        words = getattr(constraints, "value", constraints).split(",")
        outputs = sum(word.startswith("=") for word in words)
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        inputs = [register for tensor in tensors for register in tensor.expand(shape).unbind(-1)]
        assert len(words) == outputs + len(inputs), "a constraint for each register"
        home = [int(word) if word.isdigit() else number for number, word in enumerate(words)]
        registers = dict(zip(home[outputs:], inputs))
        for kind, *operands, meta, selector in _MMA.findall(getattr(text, "value", text)):
            result, *factors = ([home[int(name.strip("$"))] for name in names.split(",")] for names in operands)
            a, b, c = (torch.stack([registers[number] for number in numbers], -1) for numbers in factors)
            d = mma_sp(a, b, c, registers[home[int(meta)]], selector=int(selector), dtype=_TYPES[kind])
            registers.update(zip(result, d.unbind(-1)))
        return torch.stack([registers[number] for number in range(outputs)], -1)


def mma_sp(a: Tensor, b: Tensor, c: Tensor, meta: Tensor, *, selector: int, dtype: torch.dtype) -> Tensor:
    """`mma.sp::ordered_metadata.m16n8k32` for any number of warps: c + a · b.

    Parameters
    ----------
    a, b : (…, 32, 4) int32: registers of 32 lanes, two entries of `dtype` each
    c : (…, 32, 4) float32
    meta : (…, 32) int32; lanes 4g + 2·selector and the next hold the positions of rows g and g + 8
    selector : 0 or 1

    Returns
    -------
    (…, 32, 4) float32

    Raises
    ------
    ValueError : if the two positions of a group do not ascend, which the manual leaves undefined
    """
    batch = meta.shape[:-1]
    register = torch.arange(4)
    row = G[:, None] + 8 * (register % 2)
    group = T[:, None] + 4 * (register // 2)
    source = 4 * G[:, None] + 2 * selector + group // 4
    positions = meta.long()[..., source] >> (16 * (register % 2) + 4 * (group % 4))
    first, second = positions & 3, positions >> 2 & 3
    if not (first < second).all():
        raise ValueError("positions of mma.sp::ordered_metadata must ascend")
    columns = torch.stack([first, second], -1) + 4 * group[..., None]
    dense = torch.zeros(*batch, 16 * 32).scatter_add_(-1, (row[..., None] * 32 + columns).flatten(-3), _pairs(a, dtype))
    inputs = torch.zeros(*batch, 8, 32)
    at = (8 * register + 2 * T[:, None])[..., None] + torch.arange(2)
    inputs[..., G[:, None, None].expand_as(at).flatten(), at.flatten()] = _pairs(b, dtype)
    product = dense.view(*batch, 16, 32) @ inputs.mT
    return c + product[..., row[:, [0, 0, 1, 1]], (2 * T[:, None] + register % 2)]


def _pairs(words: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, 32, 4) int32 → (…, 256) float32: two entries of each word, the lower half's first."""
    return words.contiguous().view(dtype).float().flatten(-2)


def run_kernel(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run every block of threads of a Gluon kernel, one after the other.

    Parameters
    ----------
    kernel : what `gluon.jit` made
    grid : how many blocks along each axis
    arguments : of the kernel, by name; tensors are passed as pointers to their memory
    """
    from triton.experimental.gluon import language as gl

    function = kernel.fn
    assert set(arguments) == set(inspect.signature(function).parameters), "all arguments, by name"
    given = {name: Pointer(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    for program in _programs(grid):
        _in_python(function, _Language(gl, program, grid))(**given)


def _in_python(function: Any, language: _Language) -> Any:
    """The function, and every kernel function that its file defines, with another `gl`."""
    names = {**function.__globals__, "gl": language}
    for name, value in function.__globals__.items():
        if isinstance(getattr(value, "fn", None), FunctionType):
            names[name] = FunctionType(value.fn.__code__, names, name)
    return FunctionType(function.__code__, names, function.__name__)


def _programs(grid: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(count) for count in grid))


class EmulatedKernel:
    """Stands in for a Gluon kernel where it is launched, `kernel[grid](…)`, and runs it here."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        signature = inspect.signature(self.kernel.fn)

        def launch(*arguments: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            assert num_warps == constants["WARPS"], "the layout spreads over as many warps as are launched"
            run_kernel(self.kernel, grid, **signature.bind(*arguments, **constants).arguments)

        return launch
