"""Every way of writing a product is seen, with the right weight, orientation and input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from llmprune.walk.products import ALL, Product, Products

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
ROWS = X.reshape(-1, 8)
OI = Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))  # (out, in), as nn.Linear
IO = Parameter(OI.detach().T.contiguous())  # (in, out), as Conv1D
EXPERTS = Parameter(torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(2)))
TRANSPOSED = Parameter(EXPERTS.detach().mT.contiguous())

WAYS: dict[str, tuple[Parameter, Callable[[], Tensor]]] = {
    "linear": (OI, lambda: F.linear(X, OI)),
    "linear by keyword": (OI, lambda: F.linear(X, weight=OI)),
    "linear with bias": (OI, lambda: F.linear(X, OI, torch.zeros(6))),
    "matmul": (IO, lambda: torch.matmul(X, IO)),
    "@": (IO, lambda: X @ IO),
    "@ of a transpose": (OI, lambda: X @ OI.T),
    "method": (IO, lambda: X.matmul(IO)),
    "addmm": (IO, lambda: torch.addmm(torch.zeros(6), ROWS, IO)),
    "mm": (IO, lambda: torch.mm(ROWS, IO)),
    "weight on the left": (OI, lambda: OI @ X.mT),
    "expert by linear": (EXPERTS, lambda: F.linear(X, EXPERTS[1])),
    "expert by index tensor": (EXPERTS, lambda: F.linear(X, EXPERTS[torch.tensor(1)])),
    "expert by @": (TRANSPOSED, lambda: X @ TRANSPOSED[1]),
}


def products_of(parameter: Parameter, run: Callable[[], Tensor]) -> tuple[list[Product], Tensor]:
    met: list[Product] = []
    with torch.no_grad(), Products([("w", parameter)], met.append):
        output = run()
    return met, output


@pytest.mark.parametrize("way", WAYS)
def test_a_product_is_seen_with_weight_and_input(way: str) -> None:
    parameter, run = WAYS[way]
    met, output = products_of(parameter, run)
    assert len(met) == 1
    product = met[0]
    assert torch.equal(product.inputs, ROWS)
    truth = EXPERTS[1] if parameter.ndim == 3 else OI
    assert torch.equal(product.weight, truth)
    assert product.weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert product.key.expert == (1 if parameter.ndim == 3 else None)
    assert torch.equal(output, run())


def test_all_experts_at_once() -> None:
    stacked = torch.randn(3, 5, 8)
    for parameter, run in (
        (TRANSPOSED, lambda: torch.bmm(stacked, TRANSPOSED)),
        (EXPERTS, lambda: stacked @ EXPERTS.mT),
    ):
        met, _ = products_of(parameter, run)
        assert met[0].key.expert == ALL
        assert torch.equal(met[0].weight, EXPERTS)
        assert torch.equal(met[0].inputs, stacked)


@pytest.mark.parametrize(
    "run",
    [
        lambda: F.linear(X, OI.clone()),  # copied
        lambda: F.linear(X.double(), OI.double()),  # cast
        lambda: F.linear(X, OI[:3]),  # a part
        lambda: X * OI[0],  # no product
        lambda: torch.einsum("bti,oi->bto", X, OI.clone()),
    ],
)
def test_what_is_no_product_with_the_whole_stored_matrix_is_not_seen(run: Callable[[], Tensor]) -> None:
    assert products_of(OI, run)[0] == []


def test_other_parameters_pass_unseen() -> None:
    assert products_of(Parameter(torch.randn(6, 8)), lambda: F.linear(X, OI))[0] == []
