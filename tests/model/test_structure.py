"""Which matrices of a layer are left dense on purpose, and how large a model's files are."""

from __future__ import annotations

import pytest
from torch import nn

from llmprune.model.size import _total
from llmprune.model.structure import matrices_of


class Block(nn.Module):
    """Experts in a list of modules, and a router beside them."""

    def __init__(self, gate: nn.Module, *, alike: bool = True) -> None:
        super().__init__()
        sizes = [16] * 8 if alike else [16 + 8 * index for index in range(8)]
        self.experts = nn.ModuleList(nn.Linear(24, size) for size in sizes)
        self.gate, self.shared = gate, nn.Linear(24, 16)


def names_and_routers(block: Block) -> tuple[set[str], set[str]]:
    layer = nn.Module()
    layer.mlp = block
    found = matrices_of(layer, "")
    return set(found.names), {row.name for row in found.skipped if row.reason == "a router"}


def test_a_router_beside_listed_experts_stays_dense() -> None:
    names, routers = names_and_routers(Block(nn.Linear(24, 8)))
    assert routers == {"mlp.gate.weight"}
    assert names == {"mlp.shared.weight", *(f"mlp.experts.{index}.weight" for index in range(8))}


def test_a_router_of_several_matrices_stays_dense_as_a_whole() -> None:
    """With an output more than there are experts, for none of them."""
    _, routers = names_and_routers(Block(nn.Sequential(nn.Linear(24, 12), nn.Linear(12, 9))))
    assert routers == {"mlp.gate.0.weight", "mlp.gate.1.weight"}


def test_a_list_of_unlike_modules_is_no_list_of_experts() -> None:
    names, routers = names_and_routers(Block(nn.Linear(24, 8), alike=False))
    assert not routers
    assert "mlp.gate.weight" in names


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ({f"model-{n:05}-of-00002.safetensors": 50 for n in (1, 2)} | {"consolidated.safetensors": 100}, 100),
        ({"model.safetensors": 7, "model.fp16.safetensors": 4, "onnx/model.safetensors": 9}, 7),
        ({"pytorch_model.bin": 5, "training_args.bin": 1}, 5),
        ({"weights.safetensors": 3, "more.safetensors": 2}, 5),
        ({"README.md": 1}, None),
    ],
)
def test_a_model_is_as_large_as_the_files_that_are_loaded(files: dict[str, int], size: int | None) -> None:
    assert _total(iter(files.items())) == size
