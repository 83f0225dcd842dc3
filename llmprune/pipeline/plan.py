"""Which pattern each linear gets, settled before the first weight changes.

Uniform costs nothing. The others go through the dense model once, layer by layer, on a few of the calibration windows:

- "owl" takes the norms of the inputs, and counts outliers;
- "error" prunes one linear at a time as Wanda would, refits it quickly, at a few sparsities (or at the levels that are
  allowed), and looks at how far the layer's hidden states move. How much a layer's moving matters is seen at the end of
  the model: beside the dense hidden states, those of one copy for each layer, in which only that layer is pruned, go
  through all layers after it. So early layers, whose errors grow on the way, weigh as much as they should.

Memory: a layer, its Hessians, and for "error" the hidden states of `WINDOWS` windows once for each layer before.
Time of "error": for every linear five small refits and forwards of its layer on `WINDOWS` windows, and for the copies
half as many forwards of the model as it has layers, on as many windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmprune.machine import give_back_memory
from llmprune.pipeline.overrides import overridden
from llmprune.pipeline.survey import Survey
from llmprune.pipeline.walkable import caller, dtype_on, record_layers, walkable
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
from llmprune.sparsity.least_squares import refit
from llmprune.sparsity.masks import mask_per_matrix, nm_mask
from llmprune.sparsity.pattern import NM, Pattern, Unstructured
from llmprune.sparsity.statistics import FeatureNorm, Hessian, Statistic
from llmprune.walk.products import Product, Products
from llmprune.walk.resident import resident
from llmprune.walk.survey import Schedule

__all__ = ["Plan", "make_plan"]

WINDOWS = 8
"""Calibration windows that allocations are measured on."""

REFIT_STEPS, DAMPING = 10, 0.03


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

    unit : how many scopes it has in which zeros are counted apart (its rows, or its experts, or itself)
    """

    layer: int
    name: str
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
    windows : calibration tokens (num_samples, seq_len); the first `WINDOWS` are used, none where nothing is measured
    scope : "row" or "matrix", where the method counts out the zeros of an unstructured pattern
    overrides : entry → pattern or "dense", see `overridden`; such weights have no part in the allocation

    Raises
    ------
    UserError
        for overrides that match nothing or do not divide, or a budget that the levels cannot reach.
    """
    linears = _linears(survey, scope)
    names = {linear: survey.decoder.prefixes[linear.layer] + linear.name for linear in linears}
    said = overridden({names[linear]: linear.in_features for linear in linears}, overrides or {})
    free = [linear for linear in linears if names[linear] not in said]
    chosen: dict[_Linear, Pattern | None] = dict.fromkeys(free, allocation.pattern)
    if free and allocation.kind != "uniform":
        batches = list(windows[:WINDOWS].split(batch_size))
        with walkable(model), torch.no_grad():
            measure, kind = MEASURES[allocation.kind]
            chosen = measure(_turns(model, batches, survey, device, kind), free, allocation)
    patterns = chosen | {linear: said[name] for linear, name in names.items() if name in said}
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
            found.append(_Linear(index, name, parameter.numel(), in_features, unit))
    return found


# The dense model, layer by layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Turn:
    """A layer of the dense model in its turn, resident where it is computed.

    call : one batch of hidden states through the layer, (layer, hidden, batch number)
    inputs, outputs : per batch, hidden states (batch, seq_len, hidden_size)
    statistics : of the inputs of each parameter
    """

    index: int
    layer: nn.Module
    schedule: Schedule
    call: Callable[[nn.Module, Tensor, int], Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    statistics: dict[str, Statistic]

    def run(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The layer, as its weights are now, on all batches."""
        return [self.call(self.layer, states, batch) for batch, states in enumerate(hidden)]

    def weight(self, name: str) -> Tensor:
        """A view on a parameter, (out_features, in_features) or (experts, out_features, in_features)."""
        parameter = self.layer.get_parameter(name).data
        return parameter if self.schedule.input_axes[name] == 1 else parameter.mT

    @contextmanager
    def pruned(self, patterns: Mapping[str, Pattern]) -> Iterator[None]:
        """The layer with these parameters pruned, for a `with` block."""
        before = {name: self.weight(name).clone() for name in patterns}
        try:
            for name, pattern in patterns.items():
                self.weight(name).copy_(_quickly_pruned(before[name].float(), self.statistics[name], pattern))
            yield
        finally:
            for name, weight in before.items():
                self.weight(name).copy_(weight)


def _turns(
    model: nn.Module, batches: list[Tensor], survey: Survey, device: torch.device, kind: type[Statistic]
) -> Iterator[_Turn]:
    """One layer after the other, with statistics of this kind; to be called without gradients."""
    recording = record_layers(model, survey.decoder, batches, device)
    hidden = recording.hidden
    for index, layer in enumerate(survey.decoder.layers):
        call, schedule = caller(recording, index), survey.schedules[index]
        with resident(layer, device, dtype_on(device, layer)):
            sums, products = _watched(layer, schedule, kind)
            with products:
                outputs = [call(layer, states, batch) for batch, states in enumerate(hidden)]
            yield _Turn(index, layer, schedule, call, hidden, outputs, sums)
        hidden, recording.calls[index] = outputs, []
        give_back_memory()


def _watched(layer: nn.Module, schedule: Schedule, kind: type[Statistic]) -> tuple[dict[str, Statistic], Products]:
    """Statistics by parameter that fill up while the products are on. Weights with one input share theirs, and so do
    the experts of a stack, whichever tokens they meet."""
    parameters = dict(layer.named_parameters())
    first = {key.parameter: station.weights[0].parameter for station in schedule.stations for key in station.weights}
    sums: dict[str, Statistic] = {}
    for name in set(first.values()):
        parameter = parameters[name]
        sums[name] = kind(parameter.shape[-1 if schedule.input_axes[name] == 1 else -2], parameter.device)

    def meet(product: Product) -> None:
        if first[product.key.parameter] == product.key.parameter:
            inputs = product.inputs.flatten(0, -2)
            sums[product.key.parameter].update(inputs[inputs.any(-1)] if product.inputs.ndim == 3 else inputs)

    return {name: sums[one] for name, one in first.items()}, Products(
        [(name, parameters[name]) for name in first], meet
    )


def _quickly_pruned(weight: Tensor, statistic: Statistic, pattern: Pattern) -> Tensor:
    """Wanda's mask over the whole matrix, and a few steps of refit: near to what a better method will do.

    Parameters
    ----------
    weight : ([experts,] out_features, in_features) float32
    """
    assert isinstance(statistic, Hessian)
    if weight.ndim == 3:
        return torch.stack([_quickly_pruned(expert, statistic, pattern) for expert in weight])
    scores = weight.abs() * statistic.norms
    if isinstance(pattern, NM):
        mask = nm_mask(scores, pattern.n, pattern.m)
    else:
        mask = mask_per_matrix(scores, pattern.zeros_of(weight.numel()))
    start = weight.where(mask, 0)
    return refit(start, mask, statistic.matrix, target=weight, dampening_frac=DAMPING, steps=REFIT_STEPS)


# Allocations ----------------------------------------------------------------------------------------------------------


def _by_outliers(
    turns: Iterable[_Turn], linears: Sequence[_Linear], allocation: Allocation
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
    turns: Iterable[_Turn], linears: Sequence[_Linear], allocation: Allocation
) -> dict[_Linear, Pattern | None]:
    menu = _menu(allocation)
    errors: dict[_Linear, list[float]] = {}
    copies: dict[int, list[Tensor]] = {}
    dense: list[Tensor] = []
    for turn in turns:
        copies = {layer: turn.run(hidden) for layer, hidden in copies.items()}
        own = [linear for linear in linears if linear.layer == turn.index]
        for linear in own:
            errors[linear] = [_error_of(turn, linear, level) for level in menu]
        if own:
            with turn.pruned({linear.name: allocation.pattern for linear in own}):
                copies[turn.index] = turn.run(turn.inputs)
        dense = turn.outputs
    at_pattern = menu.index(allocation.pattern)
    for layer, hidden in copies.items():
        own = [linear for linear in linears if linear.layer == layer]
        weight = _moved(hidden, dense) / max(sum(errors[linear][at_pattern] for linear in own), 1e-30)
        for linear in own:
            errors[linear] = [weight * error for error in errors[linear]]
    return _cheapest_levels(linears, errors, menu, allocation)


def _menu(allocation: Allocation) -> list[Pattern | None]:
    """The levels at which errors are measured: those that are allowed, or points on a curve."""
    if isinstance(allocation.pattern, NM):
        return list(allocation.menu)
    (least, most), middle = bounds(allocation.total), allocation.total
    points = [least, (least + middle) / 2, middle, (middle + most) / 2, most]
    return [Unstructured(point) for point in points]


def _error_of(turn: _Turn, linear: _Linear, level: Pattern | None) -> float:
    if level is None or not level.fits(linear.in_features):
        return 0.0 if level is None else math.inf
    with turn.pruned({linear.name: level}):
        return _moved(turn.run(turn.inputs), turn.outputs)


def _moved(hidden: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """The squared distance of hidden states from the dense ones, relative to their size, mean over tokens."""
    shares = [
        (one.float() - other.float()).square().sum(-1) / other.float().square().sum(-1).clamp_min(1e-30)
        for one, other in zip(hidden, dense, strict=True)
    ]
    return torch.cat([share.flatten() for share in shares]).mean().item()


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
        zeros = cheapest(curves, round(allocation.total * sum(sizes)), divisible=True)
        return _rounded(linears, [count / size for count, size in zip(zeros, sizes, strict=True)], allocation.total)
    menus = [_levels_of(linear, errors[linear], menu) for linear in linears]
    zeros = cheapest([list(options) for options in menus], math.ceil(allocation.total * sum(sizes)), divisible=False)
    by_zeros = [{level.zeros: pattern for level, pattern in options.items()} for options in menus]
    return {linear: options[count] for linear, options, count in zip(linears, by_zeros, zeros, strict=True)}


def _levels_of(linear: _Linear, errors: Sequence[float], menu: Sequence[Pattern | None]) -> dict[Level, Pattern | None]:
    """What a linear may get, one pattern for each number of zeros."""
    best: dict[int, tuple[float, Pattern | None]] = {}
    for pattern, error in zip(menu, errors, strict=True):
        zeros = pattern.zeros_of(linear.size) if pattern is not None else 0
        if error < best.get(zeros, (math.inf, None))[0]:
            best[zeros] = (error, pattern)
    return {Level(zeros, error): pattern for zeros, (error, pattern) in best.items()}


MEASURES: dict[str, tuple[Callable[..., dict[_Linear, Pattern | None]], type[Statistic]]] = {
    "owl": (_by_outliers, FeatureNorm),
    "error": (_by_error, Hessian),
}
"""How each allocation is found, and the statistic it needs."""
