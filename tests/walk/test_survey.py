"""The survey: what a layer's schedule says of its stations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.pipeline.survey import survey_model
from llmprune.walk.survey import Station, survey_layer
from tests.builders import tiny_model
from tests.walk.listed_experts import ListedExperts


def stations_of(layer: nn.Module, hidden: Tensor) -> list[Station]:
    matrices = [name for name, p in layer.named_parameters() if p.ndim >= 2]
    schedule, _ = survey_layer(layer, lambda m: m(hidden), matrices)
    return list(schedule.stations)


def test_experts_in_a_list_of_modules_cannot_be_compared_and_the_router_can() -> None:
    torch.manual_seed(0)
    stations = stations_of(ListedExperts(8, 12, 4), torch.randn(2, 20, 8))
    assert [str(s.weights[0]) for s in stations if s.comparable] == ["gate.weight"]
    assert len(stations) == 9
    assert all(station.routed for station in stations[1:])


def test_a_layer_with_several_streams_is_compared_token_by_token() -> None:
    """As Gemma 3n's, which gives several versions of its hidden states, stacked in front of (batch, seq_len)."""

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.stack([hidden[0], self.linear(hidden[0])])

    (station,) = stations_of(Streams(), torch.randn(2, 1, 20, 8))
    assert station.comparable


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_linear_of_an_ordinary_layer_can_be_compared(family: str) -> None:
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    found = survey_model(tiny_model(family), ids, PruneConfig(method="wanda"), device=torch.device("cpu"))
    assert all(station.comparable for schedule in found.schedules for station in schedule.stations)
