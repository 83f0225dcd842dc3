"""What leaves a finished layer goes to a sink.

In the plain case nothing has to be done: the layer stays in the model, in memory. Where a run can be continued after it
was cut off, the sink writes layers down; and it knows those that an earlier run had finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from llmprune.results import PrunedWeight, TunedPart

__all__ = ["FinishedLayer", "Sink"]


@dataclass
class FinishedLayer:
    """What is known of a layer when its weights are final.

    weights, tuned : rows of the report
    adjusted : full names of parameters that were changed without being pruned
    masks : by name of a parameter in the layer, what is kept of it (True), of the parameter's own shape, on the CPU;
        empty where no later step asks
    """

    weights: list[PrunedWeight] = field(default_factory=list)
    tuned: list[TunedPart] = field(default_factory=list)
    adjusted: set[str] = field(default_factory=set)
    masks: dict[str, Tensor] = field(default_factory=dict)


class Sink:
    """Takes finished layers. This one leaves them where they are, and knows of no earlier run."""

    def earlier(self, index: int) -> FinishedLayer | None:
        """What an earlier run of the same job made of this layer; None: it has not been pruned yet."""
        return None

    def restore(self, index: int, layer: nn.Module) -> None:
        """Give the layer, which is in memory and dense, the weights that the earlier run gave it."""

    def finished(self, index: int, layer: nn.Module, done: FinishedLayer) -> None:
        """The layer, still in memory, in its own dtype and place, is final."""

    def all_finished(self) -> None:
        """Every layer is final by itself; what changes all of them together, if anything, begins now."""
