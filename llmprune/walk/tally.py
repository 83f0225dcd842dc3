"""What is known so far of the inputs of one station: summed as batches come by, added up when the station is solved."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.distributed import Team
from llmprune.sparsity.statistics import Statistic

__all__ = ["Tally"]


class Tally:
    """The inputs of one station, or of one expert, where a product takes all of them.

    statistic, held : of the batches to learn from, and of those that are held out; None where none is asked for
    learn_from_all : without a statistic `held`, whether held-out batches go to the other one, or to none
    tokens : all that were met, of held-out batches too
    first : the first batch's inputs (tokens, in_features)
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        kind: type[Statistic] | None,
        *,
        hold_out: bool = False,
        learn_from_all: bool = True,
    ) -> None:
        self.statistic = kind(in_features, device) if kind else None
        self.held = kind(in_features, device) if kind and hold_out else None
        self.learn_from_all = learn_from_all
        self.tokens = 0
        self.first: Tensor | None = None

    def add(self, inputs: Tensor, dense: Tensor | None, *, held_out: bool) -> None:
        """Take in the inputs of one batch (tokens, in_features), and what the dense model has in their place."""
        if self.first is None:
            self.first = inputs
        self.tokens += len(inputs)
        statistic = self.statistic
        if held_out and (self.held is not None or not self.learn_from_all):
            statistic = self.held
        if statistic is not None:
            statistic.update(inputs)
            if dense is not None:
                statistic.compare(inputs, dense)

    def pool(self, team: Team) -> None:
        """Add up what all processes know; `first` stays this one's."""
        statistics = [statistic for statistic in (self.statistic, self.held) if statistic is not None]
        tokens, *counts = team.total(self.tokens, *(statistic.tokens for statistic in statistics))
        self.tokens = round(tokens)
        for statistic, count in zip(statistics, counts, strict=True):
            team.add(*statistic.addends())
            statistic.tokens = count
