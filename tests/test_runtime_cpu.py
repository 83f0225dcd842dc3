"""The CPU kernel against float64: every instruction set, dtype and pattern, odd sizes, and memory that is not ours."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmprune.runtime import cpu
from llmprune.sparsity.masks import nm_mask
from llmprune.sparsity.pack import Packed, pack, row_starts

LEVELS = ("avx512_bf16", "avx512", "avx2")
DTYPES = cpu.DTYPES
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

# The largest and the root mean square error, relative to those of the truth: rounding of the result, twice over.
TOLERANCE = {torch.float32: (2e-6, 1e-6), torch.float16: (1e-3, 5e-4), torch.bfloat16: (8e-3, 4e-3)}

SHAPES = [(1, 1), (3, 7), (5, 64), (7, 100), (33, 576), (2, 129), (17, 1026)]  # rows, columns
GROUPED = [(1, 4), (5, 64), (7, 100), (33, 576), (2, 132), (17, 1028)]
TOKENS = (1, 2, 3, 8, 9, 17)

on_x86_linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the kernel is written for x86-64 Linux"
)
pytestmark = on_x86_linux
each_level = pytest.mark.parametrize("level", LEVELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_pattern = pytest.mark.parametrize("pattern", ["2:4", "any"])


@dataclass(frozen=True)
class Weight:
    """A packed weight and what it was, (rows, in_features)."""

    dense: Tensor
    packed: Packed
    starts: Tensor | None

    def times(self, x: Tensor, *, bias: Tensor | None = None, level: str | None = None) -> Tensor:
        values, index, in_features = self.packed.values, self.packed.index, self.packed.in_features
        return cpu.matmul(x, values, index, starts=self.starts, bias=bias, in_features=in_features, level=_able(level))

    def expanded(self, *, out: Tensor | None = None, level: str | None = None) -> Tensor:
        values, index, in_features = self.packed.values, self.packed.index, self.packed.in_features
        return cpu.expand(values, index, starts=self.starts, in_features=in_features, out=out, level=_able(level))


def _able(level: str | None) -> str | None:
    if level is not None and level not in cpu.levels():
        pytest.skip(f"this processor has no {level}")
    return level


def _weight(rows: int, columns: int, pattern: str, dtype: torch.dtype, *, seed: int = 0) -> Weight:
    """Random, with an empty row and a full one where the pattern allows that."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    if pattern == "any":
        mask = torch.rand(rows, columns, generator=generator) < 0.5
        mask[rows // 3], mask[rows // 2] = True, False
    else:
        mask = nm_mask(torch.rand(rows, columns, generator=generator), 2, 4)
    dense = dense.where(mask, torch.zeros((), dtype=dtype))
    packed = pack(dense, pattern)
    return Weight(dense, packed, row_starts(packed.index) if pattern == "any" else None)


def _x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _truth(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dense.double().T
    return y if bias is None else y + bias.double()


def assert_close(got: Tensor, truth: Tensor, what: object = "") -> None:
    """Within rounding of the result's dtype, in the largest error and in the root mean square."""
    assert got.shape == truth.shape
    if not truth.numel():
        return
    error = got.double() - truth
    largest, mean_square = TOLERANCE[got.dtype]
    at = divmod(int(error.abs().argmax()), truth.shape[-1])
    assert error.abs().max() <= largest * truth.abs().max(), f"{what} at {at}: {got[at]} instead of {truth[at]}"
    assert error.square().mean().sqrt() <= mean_square * truth.square().mean().sqrt(), what


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, so that a place that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Products -------------------------------------------------------------------------------------------------------------


def test_there_is_a_kernel_on_a_machine_with_a_compiler() -> None:
    assert cpu.available() in LEVELS
    assert cpu.levels()[-1] == "avx2"


@each_level
@each_pattern
@each_dtype
def test_a_product_is_as_exact_as_its_dtype(level: str, pattern: str, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES if pattern == "any" else GROUPED:
        weight = _weight(rows, columns, pattern, dtype)
        for tokens in TOKENS:
            for of_x in {dtype, torch.float32}:
                x = _x(tokens, columns, dtype=of_x)
                assert_close(weight.times(x, level=level), _truth(x, weight), (rows, columns, tokens, of_x))


@each_level
def test_a_long_row_loses_nothing(level: str) -> None:
    weight = _weight(3, 20000, "any", torch.bfloat16)
    x = _x(1, 20000, dtype=torch.bfloat16)
    assert_close(weight.times(x, level=level), _truth(x, weight))
    assert_close(weight.times(x.float(), level=level), _truth(x, weight))


@each_dtype
def test_a_bias_of_any_dtype_is_added(dtype: torch.dtype) -> None:
    weight = _weight(33, 100, "any", dtype)
    x = _x(3, 100, dtype=dtype)
    for of_bias in DTYPES:
        bias = _x(33, dtype=of_bias, seed=5)
        assert_close(weight.times(x, bias=bias), _truth(x, weight, bias))


def test_inputs_may_have_any_shape_and_strides() -> None:
    weight = _weight(33, 100, "any", torch.float32)
    x = _x(100, 4, 2).permute(2, 1, 0)
    assert weight.times(x).shape == (2, 4, 33)
    assert_close(weight.times(x).reshape(8, 33), _truth(x, weight).reshape(8, 33))
    assert_close(weight.times(x[0, 0]).unsqueeze(0), _truth(x[:1, 0], weight))


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(0, 8, 3), (4, 0, 3), (4, 8, 0), (0, 0, 0)])
def test_nothing_times_nothing_has_a_shape(rows: int, columns: int, tokens: int) -> None:
    values, index = torch.empty(0), torch.zeros(rows, columns // 8, dtype=torch.uint8)
    bias = torch.arange(rows, dtype=torch.float32)
    x = torch.ones(tokens, columns)
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    y = cpu.matmul(x, values, index, starts=starts, bias=bias, in_features=columns)
    assert torch.equal(y, bias.expand(tokens, rows))
    assert torch.equal(cpu.expand(values, index, starts=starts, in_features=columns), torch.zeros(rows, columns))


@each_level
@each_dtype
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_stands_at_a_dropped_weight_does_not_reach_the_result(
    level: str, dtype: torch.dtype, wrong: float
) -> None:
    weight = _weight(33, 198, "any", dtype)
    x = _x(2, 198, dtype=dtype)
    for column in (0, 70, 197):
        spoiled = x.clone()
        spoiled[1, column] = wrong
        y = weight.times(spoiled, level=level)
        kept = weight.dense[:, column] != 0
        assert 0 < kept.sum() < 33
        assert not y[1, kept].isfinite().any()
        assert_close(y[1:, ~kept], _truth(x, weight)[1:, ~kept])
        assert_close(y[:1], _truth(x, weight)[:1])


@each_level
@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_a_weight_that_is_no_number_stays_in_its_row(level: str, special: float) -> None:
    """Vectors are loaded beyond the end of a row: its neighbour's values must not count."""
    dense = torch.zeros(3, 70)
    dense[0, ::2], dense[1, :4], dense[2, 5] = 1.0, special, 1.0
    packed = pack(dense)
    weight = Weight(dense, packed, row_starts(packed.index))
    y = weight.times(torch.ones(1, 70), level=level)
    assert y[0, [0, 2]].tolist() == [35.0, 1.0]
    assert not y[0, 1].isfinite()


@each_pattern
def test_threads_share_the_rows_and_change_nothing(pattern: str) -> None:
    weight = _weight(601, 1024, pattern, torch.bfloat16)
    x, before = _x(3, 1024, dtype=torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((weight.times(x), weight.expanded()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0][0]) for y, _ in results)
    assert all(torch.equal(dense, weight.dense) for _, dense in results)
    assert_close(results[0][0], _truth(x, weight))


# Dense again ----------------------------------------------------------------------------------------------------------


@each_level
@each_pattern
@each_dtype
def test_expanding_gives_every_bit_back(level: str, pattern: str, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES if pattern == "any" else GROUPED:
        dense = _weight(rows, columns, pattern, dtype).dense
        kept = dense.nonzero()
        special = (-0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).smallest_normal / 4)
        for place, number in zip(kept[: len(special)].tolist(), special, strict=False):
            dense[tuple(place)] = number
        packed = pack(dense, pattern)
        weight = Weight(dense, packed, row_starts(packed.index) if pattern == "any" else None)
        for out in (None, torch.full_like(dense, float("nan"))):
            got = weight.expanded(out=out, level=level)
            assert torch.equal(got.view(BITS[dtype]), dense.view(BITS[dtype])), (rows, columns)
        assert out is got


# Memory that is not ours ----------------------------------------------------------------------------------------------


def _at_the_edge(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last before a page that nobody may touch."""
    data = tensor.contiguous().view(torch.uint8).flatten().numpy().tobytes()
    pages = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    memory[pages - len(data) : pages] = data
    forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory, pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(forbidden), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - len(data)).view_as(tensor)


@each_level
@each_pattern
@each_dtype
def test_nothing_is_read_beyond_the_end(level: str, pattern: str, dtype: torch.dtype) -> None:
    """Reading one byte too many ends this process. Values may end a memory-mapped file."""
    for rows, columns in [(4, 4), (5, 68), (3, 132), (3, 2048)]:
        weight = _weight(rows, columns, pattern, dtype)
        values, index = _at_the_edge(weight.packed.values), _at_the_edge(weight.packed.index)
        guarded = Weight(weight.dense, Packed(values, index, pattern, columns), weight.starts)
        x = _x(2, columns, dtype=dtype)
        assert_close(guarded.times(_at_the_edge(x), level=level), _truth(x, weight))
        assert torch.equal(guarded.expanded(level=level), weight.dense)


# As an operator of torch ----------------------------------------------------------------------------------------------


@each_pattern
def test_torch_finds_the_operators_well_formed(pattern: str) -> None:
    weight = _weight(5, 68, pattern, torch.float32)
    values, index, starts = weight.packed.values, weight.packed.index, weight.starts
    assert cpu.available()
    ops = torch.ops.llmprune
    inputs = {"in_features": 68}
    torch.library.opcheck(ops.cpu_matmul.default, (_x(2, 68), values, index, starts, torch.ones(5)), inputs)
    torch.library.opcheck(ops.cpu_expand.default, (values, index, starts, torch.empty(5, 68)), inputs)


def test_a_compiled_function_runs_the_kernel() -> None:
    weight = _weight(33, 100, "any", torch.bfloat16)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def both(x: Tensor) -> Tensor:
        return weight.times(x).relu() + weight.expanded().sum()

    assert cpu.available()
    x = _x(2, 100, dtype=torch.bfloat16)
    assert torch.equal(both(x), weight.times(x).relu() + weight.dense.sum())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_features": 96}, "the index of 96 columns"),
        ({"x": torch.ones(2, 99)}, "x must be"),
        ({"x": torch.ones(2, 100, dtype=torch.float64)}, "float32, float16 or bfloat16"),
        ({"x": torch.ones(2, 100, dtype=torch.bfloat16)}, "or float32"),
        ({"starts": None}, "without starts"),
        ({"starts": torch.zeros(34, dtype=torch.int64)}, "do not fit starts"),
        ({"bias": torch.ones(32)}, "bias must be"),
        ({"index": torch.zeros(33, 26, dtype=torch.uint8)[:, ::2]}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    weight = _weight(33, 100, "any", torch.float32)
    arguments = {"x": torch.ones(2, 100), "values": weight.packed.values, "index": weight.packed.index}
    arguments |= {"starts": weight.starts, "bias": None, "in_features": 100, **changed}
    with pytest.raises(RuntimeError, match=message):
        cpu.matmul(**arguments)  # type: ignore[arg-type]


def test_the_plain_twins_say_the_same() -> None:
    weight = _weight(33, 100, "any", torch.bfloat16)
    values, index, bias = weight.packed.values, weight.packed.index, torch.ones(33)
    x = _x(2, 100, dtype=torch.bfloat16)
    assert torch.equal(cpu.expand_torch(values, index, in_features=100), weight.dense)
    twin = cpu.matmul_torch(x, values, index, bias=bias, in_features=100, dtype=torch.float64)
    assert torch.equal(twin, _truth(x, weight, bias))


# Without a compiler ---------------------------------------------------------------------------------------------------

WITHOUT = """
import json, warnings, torch
from llmprune.runtime import cpu
from llmprune.sparsity.pack import pack, row_starts
dense = torch.randn(33, 100).where(torch.rand(33, 100) < 0.5, torch.zeros(())).bfloat16()
packed, x = pack(dense), torch.randn(3, 100).bfloat16()
arguments = {"starts": row_starts(packed.index), "in_features": 100}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [cpu.available(), cpu.available()]
    y = cpu.matmul(x, packed.values, packed.index, bias=None, **arguments)
    out = cpu.expand(packed.values, packed.index, **arguments)
same = [torch.equal(y, torch.nn.functional.linear(x, dense)), torch.equal(out, dense)]
print(json.dumps([found, same, [str(warning.message) for warning in caught]]))
"""


def test_without_a_compiler_one_warning_and_the_right_result(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path), "CXX": "no-such-compiler -x"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, same, warnings = json.loads(done.stdout)
    assert found == [None, None]
    assert same == [True, True]
    (warning,) = warnings
    assert "there is no C++ compiler no-such-compiler" in warning
    assert "CXX" in warning
