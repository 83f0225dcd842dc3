"""One group of weights: solve, round, put in place, measure, report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llmprune.distributed import Team
from llmprune.errors import NumericError
from llmprune.pipeline.division import solve_divided
from llmprune.recipe import MeanInputs, Recipe
from llmprune.results import PrunedWeight
from llmprune.sparsity.pattern import NM, Pattern
from llmprune.sparsity.statistics import PairedHessian
from llmprune.walk.lockstep import Group
from llmprune.walk.products import WeightKey
from llmprune.walk.survey import Schedule

__all__ = ["Place", "prune_group", "recounted"]


@dataclass(frozen=True)
class Place:
    """Where in the model a group stands: what turns a weight of a layer into a row of the report.

    stored : the checkpoint's dtype of each of the layer's parameters
    adjusted : full names of parameters that were changed without being pruned; grows
    masks : of the group pruned last, (out_features, in_features)
    patterns : by parameter, where it is another than the run's
    """

    layer: int
    prefix: str
    schedule: Schedule
    stored: dict[str, torch.dtype]
    adjusted: set[str]
    masks: dict[WeightKey, Tensor] = field(default_factory=dict)
    patterns: Mapping[str, Pattern] = field(default_factory=dict)


def prune_group(
    group: Group, recipe: Recipe, pattern: Pattern, place: Place, *, team: Team | None = None
) -> Iterator[PrunedWeight]:
    """Solve the weights of a group, round them to the checkpoint's dtype, put them in place and report.

    Those that `pattern`, or another one in `place.patterns`, is common to are solved stacked, divided among the
    processes of `team`; every process gets all of them, and rank 0's rows are those of the report.
    """
    place.masks.clear()
    for one, common in _stacks(group, pattern, place.patterns):
        yield from _prune_stack(one, recipe, common, place, team=team or Team())


def _stacks(group: Group, pattern: Pattern, patterns: Mapping[str, Pattern]) -> Iterator[tuple[Group, Pattern]]:
    """The group, or its parts with one pattern each. Every part gets statistics of its own, for solving uses them up:
    copies, but for the last part."""
    together: dict[Pattern, list[int]] = {}
    for index, key in enumerate(group.keys):
        together.setdefault(patterns.get(key.parameter, pattern), []).append(index)
    for common in list(together)[:-1]:
        part = _part(group, together.pop(common))
        part.statistic = group.statistic.scaled(1.0) if group.statistic is not None else None
        part.held = group.held.scaled(1.0) if group.held is not None else None
        yield part, common
    ((common, indices),) = together.items()
    part = _part(group, indices)
    group.statistic = group.held = None  # a Hessian may be as large as all that follows
    yield part, common


def _part(group: Group, indices: list[int]) -> Group:
    keys = tuple(group.keys[index] for index in indices)
    biases = {key: group.biases[key] for key in keys if key in group.biases}
    return replace(group, keys=keys, weights=[group.weights[index] for index in indices], biases=biases)


def _prune_stack(group: Group, recipe: Recipe, pattern: Pattern, place: Place, *, team: Team) -> Iterator[PrunedWeight]:
    start = time.perf_counter()
    rows = [len(weight) for weight in group.weights]
    stacked = torch.cat([weight.float() for weight in group.weights])
    if not torch.isfinite(stacked).all():
        raise NumericError(f"{group.keys[0]} holds NaN or inf before pruning: the checkpoint itself is damaged.")
    means = _means(group, recipe)
    solved = solve_divided(
        recipe,
        stacked,
        group.statistic,
        pattern,
        rows=rows,
        held=group.held,
        centred=means is not None,
        team=team,
    )
    solution = solved.solution
    if not torch.isfinite(solution.weight).all():
        raise NumericError(
            f"{group.keys[0]}: pruning made NaN or inf of it, because its inputs depend on each other too closely for "
            "float32. Give more calibration text (--num-samples) or a larger --dampening-frac, or use --method wanda."
        )
    place.masks.update(zip(group.keys, solution.mask.split(rows), strict=True))
    group.statistic = group.held = None
    seconds = time.perf_counter() - start
    parts = zip(group.keys, group.weights, solution.weight.split(rows), solved.steps, strict=True)
    for key, weight, new, step in parts:
        rounded = _rounded(new, place.stored[key.parameter])
        (error,) = team.first(_relative_error(group.inputs, weight.float(), rounded))
        if means is not None:
            name, bias = group.biases[key]
            bias.copy_(means.bias(bias.float(), weight.float(), rounded).to(place.stored[name]))
            place.adjusted.add(place.prefix + name)
        weight.copy_(rounded)
        yield PrunedWeight(
            name=f"{place.prefix}{key}",
            parameter=place.prefix + key.parameter,
            expert=key.expert,
            input_axis=place.schedule.input_axes[key.parameter],
            layer=place.layer,
            shape=(weight.shape[0], weight.shape[1]),
            pattern=str(pattern),
            zeros=int((rounded == 0).sum()),
            scope="group" if isinstance(pattern, NM) else recipe.method.scope,
            error=error,
            tokens=group.tokens,
            seconds=seconds * len(weight) / len(stacked),
            step=step,
            notes=(*group.notes, *solution.notes),
        )


def recounted(module: nn.Module, rows: Iterable[PrunedWeight], prefix: str = "") -> list[PrunedWeight]:
    """The rows with the zeros that there are now: tuning may make a kept weight zero, or no longer zero.

    `module` is the model, or a part of it whose parameters' names begin with `prefix` there.
    """
    counted = []
    for row in rows:
        weight = module.get_parameter(row.parameter.removeprefix(prefix)).data
        counted.append(replace(row, zeros=int((weight if row.expert is None else weight[row.expert]).eq(0).sum())))
    return counted


def _means(group: Group, recipe: Recipe) -> MeanInputs | None:
    """The mean inputs, where every linear of the group has a bias to make up for a change of them."""
    if not isinstance(group.statistic, PairedHessian) or len(group.biases) < len(group.keys):
        return None
    return MeanInputs.of(group.statistic, None if recipe.hold_out else group.held)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` as the checkpoint will hold it, in float32; adding 0 turns every −0.0 into 0.0."""
    return weight.to(dtype).float() + 0.0


def _relative_error(inputs: Tensor | None, before: Tensor, after: Tensor) -> float | None:
    """‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖, or None where no token came or the dense output is zero."""
    if inputs is None:
        return None
    inputs = inputs.float()
    dense = torch.linalg.matrix_norm(inputs @ before.T).item()
    return torch.linalg.matrix_norm(inputs @ (before - after).T).item() / dense if dense else None
