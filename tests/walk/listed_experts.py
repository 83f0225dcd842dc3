"""Tiny models whose experts are linears in a list of modules, as models with code of their own have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.builders import tiny_model

__all__ = ["ListedExperts", "model_with_listed_experts"]


class ListedExperts(nn.Module):
    """Every token goes to one of the experts, two linears each; an expert without a token is not called."""

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden_size, intermediate_size, bias=False),
                nn.SiLU(),
                nn.Linear(intermediate_size, hidden_size, bias=False),
            )
            for _ in range(experts)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        share, chosen = self.gate(tokens).softmax(-1).max(-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).nonzero().flatten()
            if len(mine):
                output.index_add_(0, mine, expert(tokens[mine]) * share[mine, None])
        return output.view_as(hidden)


def model_with_listed_experts() -> Any:
    """A Llama with four such experts in each of its two layers; the same random weights every time."""
    model: Any = tiny_model("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = ListedExperts(32, 48, 4)
    return model.eval()
