"""The work of a run, layer by layer: forwards, statistics and solves, counted on small instances of themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.machine import compute_dtype
from llmprune.pipeline.groups import Place, prune_group
from llmprune.pipeline.plan import Plan
from llmprune.plan.counting import Counter, Work, extrapolated
from llmprune.plan.sketch import Sketch
from llmprune.recipe import Recipe
from llmprune.sparsity.pattern import NM, Pattern
from llmprune.sparsity.statistics import BLOCK, FeatureNorm, Hessian, PairedHessian, Statistic, factor_dtype, unpaired
from llmprune.walk.lockstep import TRUSTED, Group
from llmprune.walk.products import ALL, WeightKey
from llmprune.walk.survey import Schedule, Station

__all__ = ["Case", "Load", "Solve", "count_case", "counted", "load_of"]

SIZE = 256
"""Inputs of the smaller of the two instances that a solve is counted on."""

MET = 2
"""Experts that a token meets, as far as memory and time are concerned: most models have 1 to 8."""


@dataclass(frozen=True)
class Solve:
    """A group of weights that share an input, so many times in a layer (experts).

    rows : output rows of each weight
    times : how many of them there are
    statistic_bytes : of what is summed for it, held-out windows included
    together : how many such statistics are held at once
    cold : whether experts will meet too few tokens and wait to the end of the layer
    update, work : what the statistic and the solve of one of them take
    factors : the dtype in which the statistic multiplies inputs
    """

    rows: tuple[int, ...]
    kind: type[Statistic] | None
    times: int
    statistic_bytes: int
    together: int
    cold: bool
    update: Work
    work: Work
    factors: torch.dtype


@dataclass(frozen=True)
class Load:
    """What one layer takes.

    forward : of one window
    waiting_bytes : what one window holds in it while it waits
    solves : of its groups
    again : whether windows are run through it once more at the end: those that met an expert that had to wait, or a
        weight that is used twice
    """

    forward: Work
    waiting_bytes: int
    solves: tuple[Solve, ...]
    again: bool


def load_of(
    sketch: Sketch, schedules: Sequence[Schedule], plan: Plan, config: PruneConfig, *, device: torch.device
) -> list[Load]:
    """The load of every layer. `config` has its `seq_len`; `schedules` are without what stays dense."""
    known: dict[object, Load] = {}
    loads = []
    for index, schedule in enumerate(schedules):
        patterns = plan.patterns(index)
        alike = (id(sketch.kinds[index]), schedule.stations, tuple(patterns.items()))
        if alike not in known:
            layer = sketch.survey.decoder.layers[index]
            solves = tuple(_solves(layer, schedule, patterns, config, device))
            known[alike] = _load(sketch, index, schedule, solves, config)
        loads.append(known[alike])
    return loads


def _load(sketch: Sketch, index: int, schedule: Schedule, solves: tuple[Solve, ...], config: PruneConfig) -> Load:
    assert config.seq_len is not None
    kind = sketch.kinds[index]
    share = config.seq_len / kind.tokens
    forward = replace(kind.forward.times(share), attention=kind.forward.attention * share * share)
    again = any(station.repeated for station in schedule.stations) or any(solve.cold for solve in solves)
    return Load(forward, round(schedule.waiting_bytes * share), solves, again)


def _solves(
    layer: nn.Module, schedule: Schedule, patterns: dict[str, Pattern], config: PruneConfig, device: torch.device
) -> Iterator[Solve]:
    """The solves of a layer: at each station one for each pattern of its weights; for experts one, so many times."""
    for station in schedule.stations:
        if station.weights[0].expert not in (None, 0, ALL):
            continue  # the first expert stands for all of its stack
        together: dict[Pattern, list[str]] = {}
        for key in station.weights:
            together.setdefault(patterns[key.parameter], []).append(key.parameter)
        for pattern, names in together.items():
            weights = [layer.get_parameter(name) for name in names]
            axes = [schedule.input_axes[name] for name in names]
            biased = station.weights[0].expert is None and all(_has_bias(layer, name) for name in names)
            yield _solve(station, weights, axes, pattern=pattern, biased=biased, config=config, device=device)


def _has_bias(layer: nn.Module, weight: str) -> bool:
    """Whether the same module adds a bias to the product with a weight."""
    return weight.removesuffix("weight") + "bias" in dict(layer.named_parameters())


def _solve(
    station: Station,
    weights: Sequence[nn.Parameter],
    axes: Sequence[int],
    *,
    pattern: Pattern,
    biased: bool,
    config: PruneConfig,
    device: torch.device,
) -> Solve:
    assert config.seq_len is not None
    recipe, windows = config.recipe, config.num_samples
    shapes = [_matrix(weight, axis) for weight, axis in zip(weights, axes, strict=True)]
    in_features = shapes[0][1]
    experts = len(weights[0]) if station.weights[0].expert is not None else 1
    share = min(1.0, MET / experts) if experts > 1 else 1.0
    tokens = windows * config.seq_len * share
    kind = recipe.statistic if station.comparable or recipe.statistic is None else unpaired(recipe.statistic)
    held_out = station.comparable and bool(config.dense_targets or config.tune or config.distill)
    cold = experts > 1 and tokens < TRUSTED * in_features
    batch = round(min(config.batch_size, windows) * config.seq_len * share)
    stored = weights[0].dtype
    case = Case(
        recipe=recipe,
        pattern=pattern,
        rows=tuple(rows for rows, _ in shapes),
        in_features=in_features,
        kind=kind,
        held_out=held_out,
        biased=biased,
        tokens=max(1, batch),
        computed=compute_dtype(device, stored),
        stored=stored,
    )
    return Solve(
        rows=case.rows,
        kind=kind,
        times=experts,
        statistic_bytes=(2 if held_out else 1) * _statistic_bytes(kind, in_features),
        together=experts if cold else min(experts, -(-windows // config.batch_size)),
        cold=cold,
        update=_update(kind, in_features, tokens),
        work=counted(case),
        factors=factor_dtype(case.computed, device),
    )


def _matrix(parameter: Tensor, axis: int) -> tuple[int, int]:
    """(out_features, in_features) of a parameter, or of one expert of a stack."""
    out, into = parameter.shape[-2:] if axis == 1 else parameter.shape[-2:][::-1]
    return int(out), int(into)


def _statistic_bytes(kind: type[Statistic] | None, in_features: int) -> int:
    """Bytes of a statistic's sums."""
    if kind is None:
        return 0
    matrices = {FeatureNorm: 0, Hessian: 1, PairedHessian: 2}[kind]
    return 4 * in_features * (matrices * in_features + 1)


def _update(kind: type[Statistic] | None, in_features: int, tokens: float) -> Work:
    """What it takes to add all tokens to a statistic, see `llmprune.sparsity.statistics`."""
    if kind is None:
        return Work()
    moved = tokens * in_features * 12
    if kind is FeatureNorm:
        return Work(moved=moved)
    products = tokens * in_features * (in_features + min(BLOCK, in_features))
    if kind is PairedHessian:
        products += 2 * tokens * in_features * in_features
        moved *= 3
    return Work(products=products, moved=moved)


@dataclass(frozen=True)
class Case:
    """A solve to be counted.

    biased : whether every weight has a bias
    tokens : of the batch that errors are measured on
    computed, stored : dtypes of the weights while the layer is computed, and in the checkpoint
    """

    recipe: Recipe
    pattern: Pattern
    rows: tuple[int, ...]
    in_features: int
    kind: type[Statistic] | None
    held_out: bool
    biased: bool
    tokens: int
    computed: torch.dtype
    stored: torch.dtype

    def shrunk(self, in_features: int) -> Case:
        """The same with so many inputs, everything else in proportion."""
        scale = in_features / self.in_features
        rows = tuple(max(1, round(count * scale)) for count in self.rows)
        return replace(self, rows=rows, in_features=in_features, tokens=max(1, round(self.tokens * scale)))


@cache
def counted(case: Case) -> Work:
    """What pruning a group of weights takes, its measured error on a batch included."""
    step = case.pattern.m if isinstance(case.pattern, NM) else 1
    return extrapolated(lambda inputs: count_case(case.shrunk(inputs)), max(1, SIZE // step) * step, case.in_features)


def count_case(case: Case) -> Work:
    """What pruning a group of this very size takes."""
    group = _group(case)
    names = [key.parameter for key in group.keys]
    place = Place(
        layer=0,
        prefix="",
        schedule=Schedule((Station(group.keys),), dict.fromkeys(names, 1), (), 0),
        stored=dict.fromkeys([*names, *(name for name, _ in group.biases.values())], case.stored),
        adjusted=set(),
        patterns=dict.fromkeys(names, case.pattern),
    )
    sums = [statistic.addends() for statistic in (group.statistic, group.held) if statistic is not None]
    counter = Counter(chain.from_iterable(sums))
    sums.clear()
    with torch.no_grad(), counter:
        for _ in prune_group(group, case.recipe, case.pattern, place):
            pass
    work: Work = counter.work
    return work


def _group(case: Case) -> Group:
    """Random weights and inputs, the dense ones a little different, so that every step of a recipe finds work."""
    generator, size = torch.Generator().manual_seed(0), case.in_features
    mix = torch.randn(size, size, generator=generator) / size**0.5

    def statistic() -> Statistic | None:
        if case.kind is None:
            return None
        inputs = torch.randn(2 * size, size, generator=generator) @ mix
        found = case.kind(size, torch.device("cpu"))
        found.update(inputs)
        found.compare(inputs, inputs + 0.1 * inputs @ mix)
        return found

    keys = tuple(WeightKey(str(index)) for index in range(len(case.rows)))
    biases = {
        key: (f"bias of {key}", torch.zeros(count, dtype=case.computed))
        for key, count in zip(keys, case.rows, strict=True)
    }
    return Group(
        keys=keys,
        weights=[torch.randn(count, size, generator=generator).to(case.computed) for count in case.rows],
        statistic=statistic(),
        inputs=torch.randn(case.tokens, size, generator=generator).to(case.computed),
        tokens=case.tokens,
        held=statistic() if case.held_out else None,
        biases=biases if case.biased else {},
    )
