"""The masks of a layer as its parameters are stored, for the steps that must keep to them afterwards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from llmprune.walk.products import WeightKey
from llmprune.walk.survey import Schedule

__all__ = ["StoredMasks"]


class StoredMasks:
    """Gathers masks weight by weight.

    `of` maps a parameter's name in the layer to its mask, of the parameter's own shape: bool, True = kept; transposed
    where the parameter is, all experts of a stack in one.
    """

    def __init__(self, layer: nn.Module, schedule: Schedule) -> None:
        self.schedule, self.parameters = schedule, dict(layer.named_parameters())
        self.of: dict[str, Tensor] = {}

    def add(self, masks: Mapping[WeightKey, Tensor]) -> None:
        """Take in masks (out_features, in_features)."""
        for key, mask in masks.items():
            stored = mask if self.schedule.input_axes[key.parameter] == 1 else mask.T
            if key.expert is None:
                self.of[key.parameter] = stored
                continue
            like = self.parameters[key.parameter]
            self.of.setdefault(key.parameter, torch.ones_like(like, dtype=torch.bool))[key.expert] = stored
