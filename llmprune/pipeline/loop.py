"""Layer by layer, group by group: the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.config import PruneConfig
from llmprune.distributed import Team
from llmprune.errors import LlmpruneError, LostProcess
from llmprune.machine import free_bytes, give_back_memory, placed
from llmprune.pipeline.distill import HELD_BYTES, Predictions, distill, predictions
from llmprune.pipeline.groups import Place, prune_group, recounted
from llmprune.pipeline.masks import StoredMasks
from llmprune.pipeline.permute import PROOF_TOKENS, WINDOWS, Permuter
from llmprune.pipeline.plan import Plan, make_plan
from llmprune.pipeline.sink import FinishedLayer, Sink
from llmprune.pipeline.survey import Survey, survey_model
from llmprune.pipeline.tuner import Tuner
from llmprune.pipeline.walkable import caller, dtype_on, record_layers, walkable
from llmprune.results import PrunedWeight, SkippedWeight, TunedPart
from llmprune.sparsity.statistics import unpaired
from llmprune.walk.dense_path import DensePath
from llmprune.walk.lockstep import LayerWalk, require_finite
from llmprune.walk.recorder import Recording, record
from llmprune.walk.resident import resident
from llmprune.walk.survey import Schedule

__all__ = ["Pruned", "Watcher", "prune_layers"]

HELD_OUT = 8
"""Every so many-th batch is kept apart, to choose settings on what the others do not show; the last of fewer ones."""


@dataclass
class Pruned:
    """Which weights were pruned, which matrices were left dense and why, which other parameters were
    changed, which parts were tuned, and what a person should know about it."""

    weights: list[PrunedWeight] = field(default_factory=list)
    skipped: list[SkippedWeight] = field(default_factory=list)
    adjusted: set[str] = field(default_factory=set)
    tuned: list[TunedPart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, layer: FinishedLayer) -> None:
        """Take in what was done to one layer."""
        self.weights += layer.weights
        self.tuned += layer.tuned
        self.adjusted |= layer.adjusted


class Watcher:
    """Told what happens, so that a person can see it. This one looks away."""

    def start(self, layers: int) -> None:
        """The model was surveyed; so many layers follow."""

    def pruned(self, weight: PrunedWeight) -> None:
        """A weight was pruned."""

    def tuned(self, part: TunedPart) -> None:
        """A part of a layer was tuned."""

    def layer_done(self, index: int) -> None:
        """A layer is finished."""

    def distilled(self, done: int, total: int) -> None:
        """So many steps of the distillation are done, of `total`."""

    def say(self, sentence: str) -> None:
        """Something that a person should know."""


def prune_layers(
    model: nn.Module,
    windows: Tensor,
    config: PruneConfig,
    *,
    device: torch.device,
    watcher: Watcher | None = None,
    survey: Survey | None = None,
    sink: Sink | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
    team: Team | None = None,
) -> Pruned:
    """Prune the decoder layers of `model` in place, or, if they rest on a shelf, one by one into `sink`.

    Parameters
    ----------
    windows : calibration tokens (num_samples, seq_len) int64
    device : where layers are computed, one at a time; the model itself may stay on the CPU
    survey : what `survey_model` found, if it was asked before; else it is asked now
    sink : where finished layers go; it may know some from an earlier run, which are run but not pruned again
    keep : puts hidden states where they wait for the next layer, such as `walk.mapped`; else they stay where they are
    team : processes that do this together, each on its share of the windows; all get the same weights

    Raises
    ------
    UserError
        as `survey_model`, before anything has changed.
    NumericError
        naming the layer and weight; the layers before it are pruned already.
    """
    watcher = watcher or Watcher()
    found = survey or survey_model(model, windows, config, device=device)
    team = team or Team()
    plan = team.decided(lambda: _plan(model, windows, config, found, device=device))
    survey = plan.applied_to(found)
    result = Pruned(skipped=survey.skipped)
    if config.recipe.statistic is None and not config.tune and not config.distill:
        windows = windows[: config.batch_size]  # nothing is learned from the data: one batch shows the errors
    sink, count = sink or Sink(), len(survey.decoder.layers)
    watcher.start(count)
    if not config.distill and all(sink.earlier(index) is not None for index in range(count)):
        _restore_all(sink, survey, result)
        return result
    batches = list(windows.split(config.batch_size))
    if len(batches) == 1 and (config.recipe.dense_targets or config.tune or config.distill):
        result.notes.append(
            "all calibration windows are in one batch, so none can be held out: no dense targets, no tuning, no "
            "distillation; give more --num-samples or a smaller --batch-size"
        )
    with walkable(model):
        wanted = _predictions(model, batches, device, watcher) if config.distill and len(batches) > 1 else []
        loop = _Loop(model, batches, config=config, survey=survey, plan=plan, device=device, keep=keep, team=team)
        give_back_memory()  # what loading and the survey left
        for index in range(count):
            result.add(loop.prune_layer(index, sink, watcher))
            give_back_memory()
            watcher.layer_done(index)
        sink.all_finished()
        if loop.permuter is not None and not loop.permuter.free:
            result.notes.append(
                "permute did nothing: in no layer could it be proved that inputs of an N:M weight may change places"
            )
        if wanted:
            result.tuned.append(loop.distill(wanted, watcher))
            watcher.tuned(result.tuned[-1])
            result.weights = recounted(model, result.weights)
    return result


def _plan(model: nn.Module, windows: Tensor, config: PruneConfig, survey: Survey, *, device: torch.device) -> Plan:
    return make_plan(
        model,
        windows,
        config.build_allocation(),
        survey,
        device=device,
        scope=config.recipe.method.scope,
        overrides=config.override_map,
        batch_size=config.batch_size,
    )


def _predictions(model: nn.Module, batches: list[Tensor], device: torch.device, watcher: Watcher) -> list[Predictions]:
    with placed(model, device) as there:
        if not there:
            watcher.say(f"The whole model does not fit on {device}: its predictions are computed where it is.")
        return predictions(model, batches)


def _restore_all(sink: Sink, survey: Survey, result: Pruned) -> None:
    """An earlier run had finished every layer, so nothing has to be run."""
    for index in range(len(survey.decoder.layers)):
        done = sink.earlier(index)
        assert done is not None
        with survey.decoder.turn(index) as layer:
            sink.restore(index, layer)
        result.add(done)


class _Loop:
    """What goes from layer to layer: how each is called, and the hidden states of the pruned and of the dense model,
    for this process's share of the batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        *,
        config: PruneConfig,
        survey: Survey,
        plan: Plan,
        device: torch.device,
        keep: Callable[[Tensor], Tensor] | None,
        team: Team,
    ) -> None:
        share = team.share(len(batches))
        self.model, self.batches, self.team = model, [batches[index] for index in share], team
        self.config, self.survey, self.device, self.keep = config, survey, device, keep
        self.plan, self.recipe = plan, config.recipe
        self.masks: dict[str, Tensor] = {}
        self.pruned = self._record(model)
        # Recorded twice, because some layers share state through their arguments.
        compared = (self.recipe.dense_targets or config.tune) and len(batches) > 1
        self.dense = self._record(model) if compared else None
        self.permuter = self._permuter(model, batches)
        self.first_windows = range(len(share))[: max(0, WINDOWS - share.start)]
        every = min(HELD_OUT, max(2, len(batches)))
        held_out = frozenset(index - share.start for index in range(every - 1, len(batches), every) if index in share)
        self.held_out = held_out if compared or config.distill else frozenset()

    def prune_layer(self, index: int, sink: Sink, watcher: Watcher) -> FinishedLayer:
        """Prune one layer, unless an earlier run did, and let its outputs take the place of its inputs."""
        prefix = self.survey.decoder.prefixes[index]
        with self.survey.decoder.turn(index) as layer:
            earlier = sink.earlier(index)
            with resident(layer, self.device, dtype_on(self.device, layer)) as stored, _naming(prefix):
                moved = self._permute(layer, index)
                with self._dense_path(layer, index) as dense:
                    if earlier is None:
                        done = self._walk_through(layer, index, dense, stored=stored, watcher=watcher)
                        done.adjusted |= moved
                    else:
                        done = earlier
                        sink.restore(index, layer)
                        self._run_through(layer, index)
                    if dense is not None and index + 1 < len(self.survey.decoder.layers):
                        dense.outputs(self.keep)
            if earlier is None:
                sink.finished(index, layer, done)
        self.masks |= {prefix + name: mask for name, mask in done.masks.items()}
        for recording in filter(None, (self.pruned, self.dense)):
            recording.calls[index] = []
        return done

    def _walk_through(
        self,
        layer: nn.Module,
        index: int,
        dense: DensePath | None,
        *,
        stored: dict[str, torch.dtype],
        watcher: Watcher,
    ) -> FinishedLayer:
        """Prune the layer group by group as its inputs come by."""
        prefix, schedule = self.survey.decoder.prefixes[index], self.survey.schedules[index]
        done, masks = FinishedLayer(), StoredMasks(layer, schedule)
        place = Place(index, prefix, schedule, stored, done.adjusted, patterns=self.plan.patterns(index))
        walk = self._walk(layer, index, dense if self.recipe.dense_targets else None)
        tuner = self._tuner(walk, dense, index, stored)
        with closing(iter(walk)) as groups:  # closed at once, not when it is collected, if a solve fails
            for group in groups:
                for row in prune_group(group, self.recipe, self.config.pattern, place, team=self.team):
                    done.weights.append(row)
                    watcher.pruned(row)
                if tuner is not None or self.config.distill:
                    masks.add(place.masks)
                for part in tuner.pruned(group, masks) if tuner else ():
                    done.tuned.append(replace(part, part=prefix + part.part))
                    watcher.tuned(done.tuned[-1])
        self.pruned.hidden = walk.outputs
        if tuner is not None:
            done.weights = recounted(layer, done.weights, prefix)
        if self.config.distill:
            done.masks = {name: mask.cpu() for name, mask in masks.of.items()}
        return done

    def _run_through(self, layer: nn.Module, index: int) -> None:
        """Run a layer that is finished already."""
        call, hidden = caller(self.pruned, index), self.pruned.hidden
        with torch.no_grad():
            for batch, states in enumerate(hidden):
                output = require_finite(call(layer, states, batch))
                hidden[batch] = self.keep(output) if self.keep is not None else output

    def _permute(self, layer: nn.Module, index: int) -> set[str]:
        """Change places in the layer, if that is asked for; full names of what changed without being pruned later."""
        if self.permuter is None:
            return set()
        prefix, schedule = self.survey.decoder.prefixes[index], self.survey.schedules[index]
        hidden = [self.pruned.hidden[batch] for batch in self.first_windows]
        patterns, call = self.plan.patterns(index), caller(self.pruned, index)
        moved = self.permuter.permute(layer, index, schedule, patterns=patterns, hidden=hidden, call=call)
        scheduled = {key.parameter for station in schedule.stations for key in station.weights}
        return {prefix + name for name in moved - scheduled}

    def _record(self, model: nn.Module) -> Recording:
        decoder, forms = self.survey.decoder, self.survey.forms
        return record_layers(model, decoder, self.batches, self.device, keep=self.keep, forms=forms)

    def distill(self, wanted: list[Predictions], watcher: Watcher) -> TunedPart:
        """Tune what all layers have kept, together, towards these predictions of the dense model."""
        self.pruned.hidden, self.dense = [], None
        beside = HELD_BYTES * sum(mask.numel() for mask in self.masks.values())
        with placed(self.model, self.device, beside=beside) as there:
            if not there:
                watcher.say(
                    f"The model and what is adjusted do not fit on {self.device}: distilled where the model is."
                )
            return distill(
                self.model,
                self.batches,
                wanted,
                masks=self.masks,
                held_out=self.held_out,
                passes=self.config.distill or 0,
                progress=watcher.distilled,
            )

    def _permuter(self, model: nn.Module, batches: list[Tensor]) -> Permuter | None:
        if not self.config.permute:
            return None
        with self.survey.decoder.surroundings():
            ids = batches[0][:1, :PROOF_TOKENS].to(next(model.parameters()).device)
            # On the device where the layers will be when they have their turn.
            place = partial(_float64, device=self.device)
            proof = record(model, self.survey.decoder.layers, [ids], place=place, forms=self.survey.forms)
        return Permuter(proof, self.team)

    def _walk(self, layer: nn.Module, index: int, dense: DensePath | None) -> LayerWalk:
        schedule, kind = self.survey.schedules[index], self.recipe.statistic
        return LayerWalk(
            layer,
            self.pruned.hidden,
            caller(self.pruned, index),
            schedule,
            kind=unpaired(kind) if kind is not None and dense is None else kind,
            capacity=self._capacity(schedule),
            dense=dense,
            held_out=self.held_out,
            learn_from_all=not self.recipe.hold_out,
            may_start_over=bool(self.config.tune),
            tidy=give_back_memory,
            keep=self.keep,
            team=self.team,
        )

    def _tuner(
        self, walk: LayerWalk, dense: DensePath | None, index: int, stored: dict[str, torch.dtype]
    ) -> Tuner | None:
        if dense is None or not self.config.tune:
            return None
        return Tuner(walk, dense, caller(self.pruned, index), stored=stored, passes=self.config.tune)

    @contextmanager
    def _dense_path(self, layer: nn.Module, index: int) -> Iterator[DensePath | None]:
        if self.dense is None:
            yield None
            return
        schedule = self.survey.schedules[index]
        calls, capacity = caller(self.dense, index), self._capacity(schedule)
        with closing(DensePath(layer, self.dense.hidden, calls, schedule, capacity=capacity)) as dense:
            yield dense

    def _capacity(self, schedule: Schedule) -> int:
        """How many batches may wait at once: as many as fill half of the memory that is free."""
        per_batch = max(1, schedule.waiting_bytes * self.config.batch_size) * (2 if self.dense else 1)
        sharing = self.team.neighbours if self.device.type == "cpu" else 1
        return max(1, free_bytes(self.device) // sharing // 2 // per_batch)


class _naming:  # noqa: N801 - reads as a word in a with statement
    """Puts the layer's name before the text of our own errors."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, LlmpruneError) and error.args and not isinstance(error, LostProcess):
            error.args = (f"{self.prefix.rstrip('.')}: {error.args[0]}", *error.args[1:])


def _float64(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float64 if tensor.is_floating_point() else None)
