"""The module with a packed weight: right for all shapes and paths, whatever is done to it."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.errors import UserError
from llmprune.runtime import cpu, dispatch, paths
from llmprune.runtime.scratch import release, scratch
from llmprune.runtime.sparse_linear import SparseLinear
from llmprune.sparsity.masks import keep_smallest_out, nm_mask
from llmprune.sparsity.pack import pack

SHAPES = [(16, 64), (7, 20), (1, 4), (33, 200)]


def sparse_weight(rows: int, inputs: int, *, pattern: str = "any", dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows + inputs)).to(dtype)
    score = weight.float().abs()
    mask = nm_mask(score, 2, 4) if pattern == "2:4" else keep_smallest_out(score, inputs // 2)
    return weight.masked_fill(~mask, 0)


def linear(rows: int = 16, inputs: int = 64, *, bias: bool = True, **settings: object) -> tuple[SparseLinear, Tensor]:
    """A module and its dense weight."""
    weight = sparse_weight(rows, inputs, **settings)  # type: ignore[arg-type]
    added = torch.linspace(-1, 1, rows).to(weight.dtype) if bias else None
    return SparseLinear.from_packed(pack(weight, str(settings.get("pattern", "any"))), added), weight


def assert_product(module: SparseLinear, weight: Tensor, x: Tensor, *, tolerance: float) -> None:
    """Against float64, by the largest error relative to the largest result."""
    bias = None if module.bias is None else module.bias.double()
    expected = F.linear(x.double(), weight.double(), bias)
    y = module(x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    if expected.numel():
        assert float((y.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("pattern", ["2:4", "any"])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_product_is_right_for_any_number_of_tokens(
    rows: int, inputs: int, pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_tell_once", lambda weight: None)  # float64 has no kernel
    module, weight = linear(rows, inputs, pattern=pattern, dtype=dtype)
    for tokens in (1, 3, 8, 9, 40):
        x = torch.randn(tokens, inputs).to(dtype)
        assert_product(module, weight, x, tolerance={4: 1e-5, 8: 1e-12}.get(dtype.itemsize, 2e-2))


@pytest.mark.parametrize("name", ["kernel", "expand", "expand32", "dense"])
def test_every_path_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, weight = linear(33, 200, dtype=torch.bfloat16)
    monkeypatch.setattr(paths, "compute_dtype", lambda device, dtype: torch.float32)  # for expand32 on any machine
    if name not in paths.paths(_weight(module), 1):
        pytest.skip(f"there is no path {name} on this machine")
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: name)
    for tokens in (1, 5, 17):
        assert_product(module, weight, torch.randn(tokens, 200).bfloat16(), tolerance=2e-2)


def _weight(module: SparseLinear):  # type: ignore[no-untyped-def]
    module(torch.zeros(1, module.in_features, dtype=module.weight.dtype))
    return module._weight


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 1, 64), (2, 3, 5, 64)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    module, weight = linear()
    module(torch.randn(2, 64))
    assert_product(module, weight, torch.randn(shape), tolerance=1e-5)


def test_inputs_that_are_not_contiguous() -> None:
    module, weight = linear()
    assert_product(module, weight, torch.randn(64, 5).T, tolerance=1e-5)
    assert_product(module, weight, torch.randn(5, 128)[:, ::2], tolerance=1e-5)


def test_a_gradient_is_refused() -> None:
    module, _ = linear()
    x = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(UserError, match="no gradients"):
        module(x)
    with torch.no_grad():
        assert not module(x).requires_grad


def test_a_weight_that_shall_be_trained_is_refused() -> None:
    module, _ = linear()
    module(torch.randn(2, 64))
    module.weight.requires_grad_(True)
    with pytest.raises(UserError, match="requires_grad=True"):
        module(torch.randn(2, 64))
    with torch.no_grad():
        assert not module(torch.randn(2, 64)).requires_grad


def test_what_does_not_fit_is_refused() -> None:
    module, _ = linear()
    with pytest.raises(RuntimeError, match=r"\(\.\.\., 64\)"):
        module(torch.randn(2, 32))
    with pytest.raises(RuntimeError, match="dtype"):
        module(torch.randn(2, 64, dtype=torch.float64))


def test_autocast_gives_the_weights_dtype() -> None:
    module, weight = linear(dtype=torch.bfloat16)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert_product(module, weight, x.bfloat16(), tolerance=2e-2)


# What is done to modules ----------------------------------------------------------------------------------------------


def test_a_copy_has_a_weight_of_its_own() -> None:
    module, weight = linear()
    x = torch.randn(2, 64)
    y = module(x)
    twin = copy.deepcopy(module)
    twin.weight.data.mul_(2)
    assert torch.equal(module(x), y)
    assert twin._handle != module._handle
    assert_product(twin, 2 * weight, x, tolerance=1e-5)


def test_it_is_read_back_from_a_file() -> None:
    module, _ = linear()
    x = torch.randn(2, 64)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_loading_another_state_is_noticed() -> None:
    module, _ = linear()
    other, weight = linear()
    moved = weight.T.reshape(weight.shape)  # as many kept in all, but not in each row
    state = SparseLinear.from_packed(pack(moved), other.bias).state_dict()
    module(torch.randn(2, 64))
    module.load_state_dict(state)
    assert_product(module, moved, torch.randn(2, 64), tolerance=1e-5)


def test_a_change_of_dtype_is_noticed() -> None:
    module, weight = linear(dtype=torch.bfloat16)
    module(torch.randn(2, 64).bfloat16())
    module.to(torch.float32)
    assert module.weight_index.dtype == torch.uint8
    assert_product(module, weight.float(), torch.randn(2, 64), tolerance=1e-5)


def test_a_weight_that_is_replaced_is_noticed() -> None:
    """As accelerate's hooks do, which bring offloaded weights for each forward."""
    module, weight = linear()
    module(torch.randn(2, 64))
    module._parameters["weight"] = nn.Parameter(2 * module.weight.data, requires_grad=False)
    assert_product(module, 2 * weight, torch.randn(2, 64), tolerance=1e-5)


def test_a_replica_of_data_parallel_holds_the_weight_as_an_attribute() -> None:
    module, weight = linear()
    x = torch.randn(2, 64)
    module(x)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(replica, name, 2 * parameter.data)
    assert_product(module, weight, x, tolerance=1e-5)
    assert torch.equal(replica(x), 2 * module(x))


def test_the_dense_weight_comes_back_bit_for_bit() -> None:
    module, weight = linear(dtype=torch.bfloat16)
    assert torch.equal(module.dense().view(torch.int16), weight.view(torch.int16))


def test_compiled_it_is_one_operator() -> None:
    module, _ = linear()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for tokens in (2, 9):
            x = torch.randn(tokens, 64)
            assert torch.equal(compiled(x), module(x))


def test_compiled_under_autocast_it_gives_the_same() -> None:
    module, _ = linear(dtype=torch.bfloat16)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, module(x))


def test_running_adds_nothing_to_the_state() -> None:
    module, _ = linear()
    before = set(module.state_dict())
    module(torch.randn(2, 64))
    assert set(module.state_dict()) == before == {"weight", "weight_index", "bias"}


# The shared buffer ----------------------------------------------------------------------------------------------------


def test_one_buffer_serves_all_sizes() -> None:
    release()
    kind = (torch.float32, torch.device("cpu"))
    large = scratch((8, 16), *kind)
    assert scratch((4, 4), *kind).data_ptr() == large.data_ptr()
    assert scratch((9, 16), *kind).shape == (9, 16)


def test_a_buffer_made_in_inference_mode_can_be_written_to_outside_of_it() -> None:
    release()
    with torch.inference_mode():
        scratch((8, 16), torch.float32, torch.device("cpu"))
    scratch((8, 16), torch.float32, torch.device("cpu")).zero_()


def test_threads_do_not_share_a_buffer() -> None:
    kind = (torch.float32, torch.device("cpu"))
    seen: list[int] = []
    mine = scratch((8, 16), *kind)
    thread = threading.Thread(target=lambda: seen.append(scratch((8, 16), *kind).data_ptr()))
    thread.start()
    thread.join()
    assert seen != [mine.data_ptr()]


def test_without_a_kernel_weights_are_held_dense_with_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: None)
    monkeypatch.setattr(dispatch, "_told", set())
    module, weight = linear()
    with pytest.warns(UserWarning, match="held dense"):
        module(torch.randn(2, 64))
    module(torch.randn(20, 64))  # another warning would be an error
    linear()[0](torch.randn(2, 64))
    assert_product(module, weight, torch.randn(2, 64), tolerance=1e-5)
    assert "dense" in module._weight.__dict__
