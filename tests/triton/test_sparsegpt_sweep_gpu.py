"""SparseGPT's sweep on a GPU: against its twin in float64, and the method against itself on the CPU."""

from __future__ import annotations

import pytest
import torch

from llmprune.methods import SparseGPT
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import Hessian
from tests.triton.sweeps import block_of, check_sweep

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pattern", [(2, 4), (1, 3), (8, 16), None], ids=str)
@pytest.mark.parametrize(("count", "rows"), [(48, 1), (96, 1001), (144, 64), (1056, 7)])
def test_a_block_is_swept_as_its_twin_does_in_float64(count: int, rows: int, pattern: tuple[int, int] | None) -> None:
    check_sweep(block_of(count, rows, device="cuda"), pattern, tolerance=1e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_the_method_prunes_as_on_the_cpu(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(300, 512, generator=generator), torch.randn(2000, 512, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        statistic = Hessian(512, torch.device(device))
        statistic.update(inputs.to(device))
        found.append(SparseGPT().prune(weight.to(device), statistic, pattern, [100, 200]))
    host, gpu = found
    assert (host.mask == gpu.mask.cpu()).float().mean() > 0.999  # near ties
    same = host.mask == gpu.mask.cpu()
    wrong = (host.weight - gpu.weight.cpu())[same].double().square().mean() / host.weight.double().square().mean()
    assert wrong < 1e-3
