"""Which pattern each linear gets, settled before the first weight changes.

Uniform costs nothing. The others go through the dense model once, layer by layer, on a few of the calibration windows:

- "owl" takes the norms of the inputs, and counts outliers;
- "error" prunes one linear at a time on trial, at a few sparsities (or at the levels that are allowed), and looks at
  how far the layer's hidden states move. How much that matters is seen at the end of the model: beside the dense hidden
  states, a copy for each layer, in which only that layer is pruned, goes through all layers after it. So a layer whose
  errors grow on their way counts for more.

Memory: a layer with its statistics, and for "error" the hidden states of `MEASURED` windows once for each layer.
Time of "error", for L layers of seven linears at three sparsities: on `MEASURED` windows 21 forwards of each layer and
L / 2 of the whole model, and a small refit for each trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmprune.errors import NumericError, UserError
from llmprune.pipeline.dense_turns import DenseTurn, dense_turns
from llmprune.pipeline.overrides import overridden
from llmprune.pipeline.survey import Survey
from llmprune.pipeline.walkable import walkable
from llmprune.results import SkippedWeight
from llmprune.sparsity.allocation import (
    Allocation,
    Level,
    bounds,
    cheapest,
    interpolated,
    outlier_share,
    owl_sparsities,
    shortest_fraction,
    sparsity_of,
    whole_zeros,
)
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import FeatureNorm, Hessian, Statistic

__all__ = ["Plan", "make_plan"]

WINDOWS = 8
"""Calibration windows that the statistics of an allocation are taken on."""

MEASURED = 2
"""Those of them on which errors are measured: enough to tell what matters, and the time goes by their number."""

OVERFLOWS = "float16 models overflow easily: try --dtype bfloat16 or float32."


@dataclass(frozen=True)
class Plan:
    """What each weight shall get.

    layers : per decoder layer, the pattern of each parameter that can be pruned; None: it stays dense
    said : full names of the parameters whose pattern an override has said
    """

    layers: tuple[dict[str, Pattern | None], ...]
    said: frozenset[str] = frozenset()

    def patterns(self, layer: int) -> dict[str, Pattern]:
        """Of the parameters of a layer that are pruned."""
        return {name: pattern for name, pattern in self.layers[layer].items() if pattern is not None}

    def applied_to(self, survey: Survey) -> Survey:
        """The survey without the weights that stay dense, which it lists as skipped."""
        schedules, skipped = [], list(survey.skipped)
        for index, patterns in enumerate(self.layers):
            dense = [name for name, pattern in patterns.items() if pattern is None]
            schedules.append(survey.schedules[index].without(set(dense)))
            for name in dense:
                full = survey.decoder.prefixes[index] + name
                shape = tuple(survey.decoder.layers[index].get_parameter(name).shape)
                by = "an override" if full in self.said else "the allocation"
                skipped.append(SkippedWeight(full, shape, f"kept dense by {by}"))
        return replace(survey, schedules=schedules, skipped=skipped)


@dataclass(frozen=True)
class _Linear:
    """A parameter that zeros are allocated to: a matrix, or a stack of experts, which all get the same.

    name, full : in its layer, and in the model
    unit : how many scopes it has in which zeros are counted apart (its rows, or its experts, or itself)
    """

    layer: int
    name: str
    full: str
    size: int
    in_features: int
    unit: int

    def with_zeros(self, zeros: int) -> Pattern:
        """The pattern with so many zeros, a multiple of `unit`."""
        return Unstructured(shortest_fraction(zeros // self.unit, self.size // self.unit))


def make_plan(
    model: nn.Module,
    windows: Tensor,
    allocation: Allocation,
    survey: Survey,
    *,
    device: torch.device,
    scope: str = "matrix",
    overrides: Mapping[str, str] | None = None,
    batch_size: int = 1,
) -> Plan:
    """Settle the pattern of every weight that `survey` found.

    Parameters
    ----------
    windows : calibration tokens (num_samples, seq_len); the first `WINDOWS` are used
    scope : "row" or "matrix", where the method counts out the zeros of an unstructured pattern
    overrides : entry → pattern or "dense", see `overridden`; such weights have no part in the allocation

    Raises
    ------
    UserError
        for overrides that match nothing or do not divide, or a budget that the levels cannot reach.
    NumericError
        naming a weight that overflows at every level when it is pruned on trial.
    """
    linears = _linears(survey, scope)
    said = overridden({linear.full: linear.in_features for linear in linears}, overrides or {})
    free = [linear for linear in linears if linear.full not in said]
    chosen: dict[_Linear, Pattern | None] = dict.fromkeys(free, allocation.pattern)
    if free and allocation.kind != "uniform":
        others = windows[MEASURED:WINDOWS]  # splitting none would make one empty batch
        batches = [windows[:MEASURED], *(others.split(batch_size) if len(others) else ())]
        with walkable(model), torch.no_grad():
            measure, kind = MEASURES[allocation.kind]
            chosen = measure(dense_turns(model, batches, survey, device, kind), free, allocation)
    patterns = chosen | {linear: said[linear.full] for linear in linears if linear.full in said}
    layers = [
        {linear.name: patterns[linear] for linear in linears if linear.layer == at}
        for at in range(len(survey.schedules))
    ]
    return Plan(tuple(layers), frozenset(said))


def _linears(survey: Survey, scope: str) -> list[_Linear]:
    found = []
    for index, (layer, schedule) in enumerate(zip(survey.decoder.layers, survey.schedules, strict=True)):
        for name, axis in schedule.input_axes.items():
            parameter = layer.get_parameter(name)
            in_features = parameter.shape[-1] if axis == 1 else parameter.shape[-2]
            stacked = parameter.shape[0] if parameter.ndim == 3 else 1
            unit = parameter.numel() // in_features if scope == "row" else stacked
            full = survey.decoder.prefixes[index] + name
            found.append(_Linear(index, name, full, parameter.numel(), in_features, unit))
    return found


# Allocations ----------------------------------------------------------------------------------------------------------


def _by_outliers(
    turns: Iterable[DenseTurn], linears: Sequence[_Linear], allocation: Allocation
) -> dict[_Linear, Pattern | None]:
    shares: dict[int, float] = {}
    for turn in turns:
        names = [linear.name for linear in linears if linear.layer == turn.index]
        norms = {name: turn.statistics[name] for name in names}
        if names:
            shares[turn.index] = outlier_share([_scores(turn.weight(name), norms[name]) for name in names])
    sizes = [sum(linear.size for linear in linears if linear.layer == layer) for layer in shares]
    spread = dict(zip(shares, owl_sparsities(list(shares.values()), sizes, allocation.total), strict=True))
    return _rounded(linears, [spread[linear.layer] for linear in linears], allocation.total)


def _rounded(linears: Sequence[_Linear], sparsities: Sequence[float], sparsity: float) -> dict[_Linear, Pattern | None]:
    """Patterns with whole numbers of zeros, in all as many as a uniform sparsity has."""
    uniform = Unstructured(sparsity)
    total = sum(linear.unit * uniform.zeros_of(linear.size // linear.unit) for linear in linears)
    sizes, units = [linear.size for linear in linears], [linear.unit for linear in linears]
    zeros = whole_zeros(sparsities, sizes, total, limits=bounds(sparsity), units=units)
    return {linear: linear.with_zeros(count) for linear, count in zip(linears, zeros, strict=True)}


def _scores(weight: Tensor, statistic: Statistic) -> Tensor:
    assert isinstance(statistic, FeatureNorm | Hessian)
    return weight.float().abs() * statistic.norms


def _by_error(
    turns: Iterable[DenseTurn], linears: Sequence[_Linear], allocation: Allocation
) -> dict[_Linear, Pattern | None]:
    menu = _menu(allocation)
    at_pattern = menu.index(allocation.pattern)
    errors: dict[_Linear, list[float]] = {}
    copies: dict[int, Tensor] = {}
    final = torch.empty(0)
    for turn in turns:
        copies = {layer: turn.run(hidden) for layer, hidden in copies.items()}
        own = [linear for linear in linears if linear.layer == turn.index]
        for linear in own:
            errors[linear] = [_error_of(turn, linear, level) for level in menu]
        if sound := [linear for linear in own if math.isfinite(errors[linear][at_pattern])]:
            with turn.pruned({linear.name: allocation.pattern for linear in sound}):
                copies[turn.index] = turn.run(turn.inputs)
        final = turn.outputs
    for layer, hidden in copies.items():
        own = [linear for linear in linears if linear.layer == layer]
        local = [errors[linear][at_pattern] for linear in own if math.isfinite(errors[linear][at_pattern])]
        weight = _moved(hidden, final) / max(sum(local), 1e-30)
        for linear in own:
            errors[linear] = [weight * error for error in errors[linear]]
    return _cheapest_levels(linears, errors, menu, allocation)


def _menu(allocation: Allocation) -> list[Pattern | None]:
    """The levels at which errors are measured: those that are allowed, or points on a curve."""
    if isinstance(allocation.pattern, NM):
        return list(allocation.menu)
    (least, most), middle = bounds(allocation.total), allocation.total
    return [Unstructured(point) for point in (least, middle, most)]


def _error_of(turn: DenseTurn, linear: _Linear, level: Pattern | None) -> float:
    if level is None or not level.fits(linear.in_features):
        return 0.0 if level is None else math.inf
    with turn.pruned({linear.name: level}):
        return _moved(turn.run(turn.inputs), turn.outputs)


def _moved(hidden: Tensor, dense: Tensor) -> float:
    """The squared distance of hidden states from the dense ones, relative to their size, mean over tokens: in most
    models the first tokens are a thousand times larger than the others, and would be all that counts."""
    hidden, dense = hidden.float(), dense.float()
    return ((hidden - dense).square().sum(-1) / dense.square().sum(-1).clamp_min(1e-30)).mean().item()


def _cheapest_levels(
    linears: Sequence[_Linear],
    errors: Mapping[_Linear, Sequence[float]],
    menu: Sequence[Pattern | None],
    allocation: Allocation,
) -> dict[_Linear, Pattern | None]:
    sizes = [linear.size for linear in linears]
    if isinstance(allocation.pattern, Unstructured):
        points = [sparsity_of(level) for level in menu]
        curves = [interpolated(points, errors[linear], linear.size) for linear in linears]
        _require_levels(linears, curves)
        wanted = round(allocation.total * sum(sizes))
        zeros = cheapest(curves, wanted, divisible=True)
        if wanted - sum(zeros) > len(linears):  # more than rounding
            raise NumericError(
                f"pruned on trial, so many weights give NaN or inf that {allocation.pattern} cannot be reached. "
                f"{OVERFLOWS}"
            )
        return _rounded(linears, [count / size for count, size in zip(zeros, sizes, strict=True)], allocation.total)
    menus = [_levels_of(linear, errors[linear], menu) for linear in linears]
    _require_levels(linears, menus)
    wanted = math.ceil(allocation.total * sum(sizes))
    zeros = cheapest([list(options) for options in menus], wanted, divisible=False)
    if sum(zeros) < wanted:
        raise UserError(
            f"a budget of {allocation.total:g} cannot be reached: of the levels that divide the weights, the sparsest "
            f"make {sum(zeros) / sum(sizes):.3f}. Nothing was changed. Give a smaller budget or other levels."
        )
    by_zeros = [{level.zeros: pattern for level, pattern in options.items()} for options in menus]
    return {linear: options[count] for linear, options, count in zip(linears, by_zeros, zeros, strict=True)}


def _levels_of(linear: _Linear, errors: Sequence[float], menu: Sequence[Pattern | None]) -> dict[Level, Pattern | None]:
    """What a linear may get, one pattern for each number of zeros; no level whose error is not a finite number."""
    best: dict[int, tuple[float, Pattern | None]] = {}
    for pattern, error in zip(menu, errors, strict=True):
        zeros = pattern.zeros_of(linear.size) if pattern is not None else 0
        if error < best.get(zeros, (math.inf, None))[0]:
            best[zeros] = (error, pattern)
    return {Level(zeros, error): pattern for zeros, (error, pattern) in best.items()}


def _require_levels(linears: Sequence[_Linear], menus: Sequence[Collection[Level]]) -> None:
    for linear, menu in zip(linears, menus, strict=True):
        if not menu:
            raise NumericError(f"{linear.full}: pruned on trial it gives NaN or inf at every level. {OVERFLOWS}")


MEASURES: dict[str, tuple[Callable[..., dict[_Linear, Pattern | None]], type[Statistic]]] = {
    "owl": (_by_outliers, FeatureNorm),
    "error": (_by_error, Hessian),
}
"""How each allocation is found, and the statistic it needs."""
