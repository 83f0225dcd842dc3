"""Which part of a layer is tuned when: as soon as its last weight is pruned, before anything after it is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.pipeline.masks import StoredMasks
from llmprune.results import TunedPart
from llmprune.walk.dense_path import DensePath
from llmprune.walk.lockstep import Group, LayerWalk
from llmprune.walk.tuning import Part, distance, parts_of, tune

__all__ = ["Tuner"]


class Tuner:
    """The tuning of one layer, told of every group that was pruned.

    Parameters
    ----------
    walk : of the layer; told to start over after a part has changed
    dense : the unpruned layer, which gives the targets
    call : runs the pruned layer, (layer, hidden, batch number) → hidden states
    stored : the checkpoint's dtype of each parameter
    passes : over the calibration windows
    """

    def __init__(
        self,
        walk: LayerWalk,
        dense: DensePath,
        call: Callable[[nn.Module, Tensor, int], Tensor],
        *,
        stored: dict[str, torch.dtype],
        passes: int,
    ) -> None:
        self.layer, self.walk, self.dense, self.call = walk.layer, walk, dense, call
        self.stored, self.passes = stored, passes
        self.parameters = dict(walk.layer.named_parameters())
        scheduled = list(dict.fromkeys(key.parameter for key in walk.position))
        self.parts = parts_of(walk.layer, scheduled)
        self.missing = {key for station in walk.schedule.stations for key in walk.keys_of(station)}

    def pruned(self, group: Group, masks: StoredMasks) -> Iterator[TunedPart]:
        """Take note of a group; tune the part that it completes, with these masks."""
        self.missing -= set(group.keys)
        waiting = {key.parameter for key in self.missing}
        for part, names in list(self.parts.items()):
            if waiting.isdisjoint(names):
                del self.parts[part]
                yield self._tune(part, names, masks)
                self.walk.start_over()

    def _tune(self, name: str, parameters: list[str], masks: StoredMasks) -> TunedPart:
        part = Part(self.layer, name, self.call)
        with self.dense.in_place():
            targets = Part(self.layer, name, self.dense.call).outputs(self.dense.hidden)
        runs = part.inputs(self.walk.hidden)
        return tune(
            name or "layer",
            [(self.parameters[parameter], masks.of.get(parameter)) for parameter in parameters],
            [partial(distance, run, target) for run, target in zip(runs, targets, strict=True)],
            held_out=self.walk.held_out,
            passes=self.passes,
            dtypes=[self.stored[parameter] for parameter in parameters],
        )
