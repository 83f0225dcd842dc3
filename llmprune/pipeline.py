"""The pruning loop: layer by layer, group by group, and nothing else.

Before the first weight changes, the layers are proved replayable and every layer is surveyed, so that a model that
cannot be pruned honestly is refused untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.errors import LlmpruneError, NumericError, UserError
from llmprune.machine import compute_dtype, free_bytes, give_back_memory
from llmprune.methods import Method
from llmprune.model.structure import (
    Decoder,
    check_ignore,
    find_decoder,
    matrices_of,
    require_reach,
    skipped_outside,
)
from llmprune.results import PrunedWeight, SkippedWeight
from llmprune.sparsity.pattern import NM, Pattern
from llmprune.walk.lockstep import Group, LayerWalk
from llmprune.walk.recorder import Recording, check_replay, record
from llmprune.walk.resident import resident
from llmprune.walk.survey import Schedule, survey_layer

__all__ = ["Pruned", "Survey", "Watcher", "prune_layers", "survey_model"]


@dataclass
class Pruned:
    """Which weights were pruned and which matrices were left dense, and why."""

    weights: list[PrunedWeight] = field(default_factory=list)
    skipped: list[SkippedWeight] = field(default_factory=list)


class Watcher:
    """Told what happens, so that a person can see it. This one looks away."""

    def start(self, layers: int) -> None:
        """The model was surveyed; so many layers follow."""

    def pruned(self, weight: PrunedWeight) -> None:
        """A weight was pruned."""

    def layer_done(self, index: int) -> None:
        """A layer is finished."""


def prune_layers(
    model: nn.Module,
    windows: Tensor,
    config: PruneConfig,
    *,
    device: torch.device,
    watcher: Watcher | None = None,
    survey: Survey | None = None,
) -> Pruned:
    """Prune the decoder layers of `model` in place.

    Parameters
    ----------
    windows : calibration tokens (num_samples, seq_len) int64
    device : where layers are computed, one at a time; the model itself may stay on the CPU
    survey : what `survey_model` found, if it was asked before; else it is asked now

    Raises
    ------
    UserError
        as `survey_model`, before anything has changed.
    NumericError
        naming the layer and weight; the layers before it are pruned already.
    """
    watcher = watcher or Watcher()
    survey = survey or survey_model(model, windows, config, device=device)
    decoder, result = survey.decoder, Pruned(skipped=survey.skipped)
    method, pattern = config.build_method(), config.pattern
    if method.statistic is None:
        windows = windows[: config.batch_size]  # nothing is learned from the data: one batch shows the errors
    batches = list(windows.split(config.batch_size))
    watcher.start(len(decoder.layers))
    with _walkable(model):
        recording = _record(model, decoder, batches, device)
        hidden = recording.hidden
        give_back_memory()  # what loading and the survey left
        for index, layer in enumerate(decoder.layers):
            with resident(layer, device, _dtype_on(device, layer)) as stored, _naming(decoder.prefixes[index]):
                schedule = survey.schedules[index]
                walk = LayerWalk(
                    layer,
                    hidden,
                    _caller(recording, index),
                    schedule,
                    kind=method.statistic,
                    capacity=_capacity(schedule, config.batch_size, device),
                )
                place = _Place(index, decoder.prefixes[index], schedule, stored)
                with closing(iter(walk)) as groups:  # closed at once, not when it is collected, if a solve fails
                    for group in groups:
                        for row in _prune_group(group, method, pattern, place):
                            result.weights.append(row)
                            watcher.pruned(row)
            recording.calls[index] = []
            hidden = walk.outputs
            give_back_memory()
            watcher.layer_done(index)
    return result


@dataclass(frozen=True)
class _Place:
    """Where in the model a group stands: what turns a weight of a layer into a row of the report."""

    layer: int
    prefix: str
    schedule: Schedule
    stored: dict[str, torch.dtype]


def _prune_group(group: Group, method: Method, pattern: Pattern, place: _Place) -> Iterator[PrunedWeight]:
    """Solve the weights of a group stacked, round them to the checkpoint's dtype, put them in place and report."""
    start = time.perf_counter()
    rows = [len(weight) for weight in group.weights]
    stacked = torch.cat([weight.float() for weight in group.weights])
    if not torch.isfinite(stacked).all():
        raise NumericError(f"{group.keys[0]} holds NaN or inf before pruning: the checkpoint itself is damaged.")
    solution = method.prune(stacked, group.statistic, pattern, rows)
    group.statistic = None  # a Hessian may be as large as all that follows
    seconds = time.perf_counter() - start
    for key, weight, new in zip(group.keys, group.weights, solution.weight.split(rows), strict=True):
        rounded = _rounded(new, place.stored[key.parameter])
        error = _relative_error(group.inputs, weight.float(), rounded)
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
            scope="group" if isinstance(pattern, NM) else method.scope,
            error=error,
            tokens=group.tokens,
            seconds=seconds * len(weight) / len(stacked),
            notes=(*group.notes, *solution.notes),
        )


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


@dataclass(frozen=True)
class Survey:
    """What can be pruned in a model: its decoder layers, a schedule for each, and the matrices that stay dense."""

    decoder: Decoder
    schedules: list[Schedule]
    skipped: list[SkippedWeight]


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
    with _walkable(model):
        decoder = find_decoder(model)
        check_replay(model, decoder.layers, windows[:1])
        schedules, skipped = _survey_layers(model, decoder, windows[:1], config, device)
    return Survey(decoder, schedules, skipped + skipped_outside(model, decoder))


def _survey_layers(
    model: nn.Module, decoder: Decoder, ids: Tensor, config: PruneConfig, device: torch.device
) -> tuple[list[Schedule], list[SkippedWeight]]:
    recording = _record(model, decoder, [ids], device)
    schedules: list[Schedule] = []
    skipped: list[SkippedWeight] = []
    hidden = recording.hidden[0]
    for index, layer in enumerate(decoder.layers):
        prefix, call = decoder.prefixes[index], recording.calls[index][0]
        matrices = matrices_of(layer, prefix, config.ignore)
        with resident(layer, device, _dtype_on(device, layer)):
            schedule, output = survey_layer(layer, lambda m, c=call, h=hidden: c(m, h), matrices.names)  # type: ignore[misc]
        hidden = output
        require_reach(prefix, layer, matrices.names, schedule.out_of_reach)
        missed = [_missed(layer, prefix, name) for name in schedule.out_of_reach]
        schedule, indivisible = _divisible(layer, prefix, schedule, config)
        schedules.append(schedule)
        skipped += [*matrices.skipped, *missed, *indivisible]
    if not any(schedule.stations for schedule in schedules):
        raise UserError("there is no weight left to prune: everything is ignored or skipped. Nothing was changed.")
    return schedules, skipped


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
        if config.pattern.fits(in_features):
            continue
        if config.on_indivisible == "error":
            raise UserError(
                f"{prefix}{name} has {in_features} inputs, which do not divide into groups of {config.sparsity}. "
                "Nothing was changed. To leave such weights dense: --on-indivisible skip."
            )
        reason = f"{in_features} inputs do not divide into groups of {config.sparsity}"
        skipped.append(SkippedWeight(prefix + name, shape, reason))
    return schedule.without({row.name.removeprefix(prefix) for row in skipped}), skipped


class _walkable:  # noqa: N801 - reads as a word in a with statement
    """Eval mode and experts multiplied one by one for the time of the walk; afterwards as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = {module: module.training for module in self.model.modules()}
        self.experts = getattr(getattr(self.model, "config", None), "_experts_implementation", None)
        self.model.eval()
        if self.experts is not None:
            self.model.set_experts_implementation("eager")  # type: ignore[operator]

    def __exit__(self, *_: object) -> None:
        for module, training in self.training.items():
            module.training = training
        if self.experts is not None:
            self.model.set_experts_implementation(self.experts)  # type: ignore[operator]


class _naming:  # noqa: N801 - reads as a word in a with statement
    """Puts the layer's name before the text of our own errors."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, LlmpruneError) and error.args:
            error.args = (f"{self.prefix.rstrip('.')}: {error.args[0]}", *error.args[1:])


def _dtype_on(device: torch.device, layer: nn.Module) -> torch.dtype:
    floats = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    return compute_dtype(device, max(set(floats), key=floats.count))


def _record(model: nn.Module, decoder: Decoder, batches: Sequence[Tensor], device: torch.device) -> Recording:
    dtype = _dtype_on(device, decoder.layers[0])
    home = next(model.parameters()).device

    def place(tensor: Tensor) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(device, dtype if half else tensor.dtype)

    return record(model, decoder.layers, [ids.to(home) for ids in batches], place=place)


def _caller(recording: Recording, index: int) -> Callable[[nn.Module, Tensor, int], Tensor]:
    calls = recording.calls[index]
    return lambda layer, hidden, batch: calls[batch](layer, hidden)


def _capacity(schedule: Schedule, batch_size: int, device: torch.device) -> int:
    """How many batches may wait at once: as many as fill half of the memory that is free."""
    per_batch = max(1, schedule.waiting_bytes * batch_size)
    return max(1, free_bytes(device) // 2 // per_batch)
