"""What can be pruned in a model, found before the first weight changes.

The layers are proved replayable and every layer is surveyed, so that a model that cannot be pruned honestly is refused
untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.errors import UserError
from llmprune.model.structure import (
    IGNORED,
    Decoder,
    LayerMatrices,
    check_ignore,
    find_decoder,
    matrices_of,
    require_reach,
    skipped_outside,
)
from llmprune.pipeline.overrides import speaks_of
from llmprune.pipeline.walkable import dtype_on, record_layers, walkable
from llmprune.results import SkippedWeight
from llmprune.walk.recorder import check_replay
from llmprune.walk.resident import resident
from llmprune.walk.survey import Schedule, survey_layer

__all__ = ["Survey", "require_some", "settled", "survey_model"]


@dataclass(frozen=True)
class Survey:
    """What can be pruned in a model: its decoder layers, a schedule for each, and the matrices that stay dense.

    forms : whether each layer returns a tuple
    """

    decoder: Decoder
    schedules: list[Schedule]
    skipped: list[SkippedWeight]
    forms: list[bool] | None = None


def survey_model(model: nn.Module, windows: Tensor, config: PruneConfig, *, device: torch.device) -> Survey:
    """Run one window through all layers, find their products, and refuse what cannot be pruned honestly.

    Raises
    ------
    UnsupportedModel
        if there are no layers, they cannot be called one by one, or too much of them is out of reach.
    UserError
        for an `ignore` entry that matches nothing, weights that do not divide into groups of m, or nothing to prune.
    """
    check_ignore(model, config.ignore)
    with walkable(model):
        decoder = find_decoder(model)
        with decoder.surroundings():
            forms = check_replay(model, decoder.layers, windows[:1])
        schedules, skipped = _survey_layers(model, decoder, windows[:1], config, device=device, forms=forms)
    return Survey(decoder, schedules, skipped + skipped_outside(model, decoder), forms)


def _survey_layers(
    model: nn.Module,
    decoder: Decoder,
    ids: Tensor,
    config: PruneConfig,
    *,
    device: torch.device,
    forms: list[bool],
) -> tuple[list[Schedule], list[SkippedWeight]]:
    recording = record_layers(model, decoder, [ids], device, forms=forms)
    schedules: list[Schedule] = []
    skipped: list[SkippedWeight] = []
    hidden = recording.hidden[0]
    for index, prefix in enumerate(decoder.prefixes):
        call = recording.calls[index][0]
        with decoder.turn(index) as layer, resident(layer, device, dtype_on(device, layer)):
            matrices = matrices_of(layer, prefix, config.ignore)
            schedule, output = survey_layer(layer, lambda m, c=call, h=hidden: c(m, h), matrices.names)  # type: ignore[misc]
        hidden = output
        schedule, dense = settled(layer, prefix, schedule, matrices, config)
        schedules.append(schedule)
        skipped += dense
    require_some(schedules)
    return schedules, skipped


def settled(
    layer: nn.Module, prefix: str, schedule: Schedule, matrices: LayerMatrices, config: PruneConfig
) -> tuple[Schedule, list[SkippedWeight]]:
    """What is pruned of a layer that was surveyed, and which of its matrices stay dense and why.

    Raises
    ------
    UnsupportedModel, UserError
        if too much of the layer is out of reach, or a weight does not divide into groups of m.
    """
    if matrices.names or not any(row.reason == IGNORED for row in matrices.skipped):  # a whole layer may stay dense
        require_reach(prefix, layer, matrices.names, schedule.out_of_reach)
    missed = [_missed(layer, prefix, name) for name in schedule.out_of_reach]
    schedule, indivisible = _divisible(layer, prefix, schedule, config)
    return schedule, [*matrices.skipped, *missed, *indivisible]


def require_some(schedules: Sequence[Schedule]) -> None:
    """Raise UserError if there is nothing to prune in any layer."""
    if not any(schedule.stations for schedule in schedules):
        raise UserError("there is no weight left to prune: everything is ignored or skipped. Nothing was changed.")


def _missed(layer: nn.Module, prefix: str, name: str) -> SkippedWeight:
    return SkippedWeight(prefix + name, tuple(layer.get_parameter(name).shape), "not used in a product")


def _divisible(
    layer: nn.Module, prefix: str, schedule: Schedule, config: PruneConfig
) -> tuple[Schedule, list[SkippedWeight]]:
    """Take weights that do not divide into groups of m out of the schedule, or refuse them."""
    skipped = []
    for name, axis in schedule.input_axes.items():
        shape = tuple(layer.get_parameter(name).shape)
        in_features = shape[-1] if axis == 1 else shape[-2]
        said = any(speaks_of(entry, prefix + name) for entry in config.override_map)  # then the plan looks at it
        if said or config.pattern.fits(in_features):
            continue
        if config.on_indivisible == "error":
            raise UserError(
                f"{prefix}{name} has {in_features} inputs, which do not divide into groups of {config.sparsity}. "
                "Nothing was changed. To leave such weights dense: --on-indivisible skip."
            )
        reason = f"{in_features} inputs do not divide into groups of {config.sparsity}"
        skipped.append(SkippedWeight(prefix + name, shape, reason))
    return schedule.without({row.name.removeprefix(prefix) for row in skipped}), skipped
