"""The lockstep walk: one forward per decoder layer, exactly true-sequential, without knowing the model's code.

Every batch's forward of the layer is a coroutine. It pauses at the product with a weight that is not pruned yet, after
its input there was added to the weight's statistic. When every batch has paused there or further on, the weight has
met all its inputs: it is handed out, replaced, and the batches that wait for it go on. So each linear is calibrated on
inputs that all pruned linears before it produced, and the layer is run once.

Several processes walk together, each with its own batches: they agree on which weight comes next, and what each has
summed of its inputs is added up when it is handed out, so that all hand out the same.

The coroutines are greenlets: one thread, so that device, stream, grad mode and Ctrl-C are what they always are.

Memory: a paused batch holds its activations. Where that is too much, batches beyond `capacity` are dropped at the
pause, their input already counted, and start again later from the layer's input, through the finished weights to the
next pause.

Weights that cannot be solved at the pause are solved when all batches are through, and the batches that met them are
run once more through the finished layer: a weight met several times in one forward, and an expert that met fewer than
2 · in_features tokens (a cold one), whose statistic is filled up from all experts of its stack.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmprune.distributed import Team
from llmprune.errors import NumericError, WalkError
from llmprune.sparsity.statistics import Statistic, mixed, unpaired
from llmprune.walk.dense_path import DensePath
from llmprune.walk.products import ALL, Product, Products, WeightKey
from llmprune.walk.survey import Schedule, Station, identity
from llmprune.walk.tally import Tally

__all__ = ["Group", "LayerWalk", "require_finite"]

TRUSTED = 2
"""An expert that met fewer than TRUSTED · in_features tokens is cold."""

TIDY = 4
"""Batches between two times of tidying: activations that come and go leave holes in the heap, which are often a few
bytes too short for the next one. Giving them back costs a little time, which only Wanda is fast enough to show."""


@dataclass
class Group:
    """Weights that share one input, ready to be pruned.

    keys : which weights of the layer
    weights : per key a view on the layer's parameter, (out_features, in_features)
    statistic : of all their inputs, or None where the method needs none
    inputs : (tokens, in_features), the first batch's input, to measure errors on; None if no token came
    tokens : calibration tokens that met these weights
    held : the statistic of the held-out batches, which are not in the other; None where none are held out
    biases : of those weights that have one, its parameter's name in the layer and its values (out_features,)
    notes : what is unusual about them
    """

    keys: tuple[WeightKey, ...]
    weights: list[Tensor]
    statistic: Statistic | None
    inputs: Tensor | None
    tokens: int
    held: Statistic | None = None
    biases: dict[WeightKey, tuple[str, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class _Run:
    """One forward of one batch: its coroutine, and where it last met a product of each station."""

    batch: int
    coroutine: greenlet
    seen: dict[int, tuple[object, ...]]
    meetings: dict[int, int]


class LayerWalk:
    """Walk one layer: iterate to get the groups in order, replace their weights, then read `outputs`.

    Parameters
    ----------
    layer : the decoder layer, resident where it is computed
    hidden : per batch, the hidden states that enter it (batch, seq_len, hidden_size); used up by the walk
    call : runs the layer on one batch, (layer, hidden, batch number) → hidden states
    schedule : of the layer's weights that are to be pruned
    kind : the statistic to take, or None
    capacity : how many batches may wait at once, at least 1
    dense : the same layer unpruned, where the statistic compares the two
    held_out : batches whose inputs are summed apart (at stations that can be compared)
    learn_from_all : at the other stations, held-out batches are summed with the rest; else they are left out there
    may_start_over : `start_over` may be called, so the hidden states that enter are kept to the end
    tidy : called whenever `TIDY` batches have gone on, to give back memory that they left
    keep : puts what leaves the layer, per batch, where it waits for the next one
    team : the processes that walk this layer together, each with batches of its own

    Raises
    ------
    NumericError
        if NaN or inf reaches a weight or the layer's output. Whatever else the layer's code raises passes through,
        with all coroutines ended.
    WalkError
        if a batch departs from the schedule.
    """

    def __init__(
        self,
        layer: nn.Module,
        hidden: list[Tensor],
        call: Callable[[nn.Module, Tensor, int], Tensor],
        schedule: Schedule,
        *,
        kind: type[Statistic] | None,
        capacity: int,
        dense: DensePath | None = None,
        held_out: frozenset[int] = frozenset(),
        learn_from_all: bool = True,
        may_start_over: bool = False,
        tidy: Callable[[], None] | None = None,
        keep: Callable[[Tensor], Tensor] | None = None,
        team: Team | None = None,
    ) -> None:
        self.layer, self.hidden, self.call, self.schedule = layer, hidden, call, schedule
        self.kind, self.capacity, self.dense, self.held_out = kind, capacity, dense, held_out
        self.tidy, self.keep, self._advances = tidy, keep, 0
        self.team = team or Team()
        self.learn_from_all = learn_from_all
        self._holds_out = self.team.total(len(held_out))[0] > 0  # here or elsewhere
        self.parameters = dict(layer.named_parameters())
        self.position = {key: at for at, station in enumerate(schedule.stations) for key in station.weights}
        watched = {key.parameter for key in self.position}
        self.products = Products(((name, self.parameters[name]) for name in watched), self._meet)
        self.outputs: list[Tensor] = []
        stations = schedule.stations
        self._may_rerun = may_start_over or any(s.repeated or s.weights[0].expert is not None for s in stations)
        self._tallies: dict[WeightKey, Tally] = {}
        self._counted: dict[int, dict[int, int]] = {at: {} for at in range(len(stations))}
        self._finished: set[int] = set()
        self._pools: dict[str, Statistic] = {}
        self._postponed: list[WeightKey] = []
        self._waiting: dict[int, int] = {}
        self._live: dict[int, _Run] = {}
        self._results: dict[int, Tensor] = {}
        self._current: _Run | None = None
        self._stale: set[int] = set()
        self._started_over = False
        self._main = getcurrent()

    def __iter__(self) -> Generator[Group, None, None]:
        self._main = getcurrent()
        try:
            for batch in range(len(self.hidden)):
                self._advance(batch)
            end = len(self.schedule.stations)
            while (at := self.team.least(min(self._waiting.values(), default=end))) < end:
                yield from self._solve_now(at)
                self._finished.add(at)
                for batch in [batch for batch, where in self._waiting.items() if where == at]:
                    self._advance(batch)
            yield from self._solve_postponed()
            self._rerun()
            self.outputs = [self._results[batch] for batch in range(len(self.hidden))]
        finally:
            self._end_all()

    # Groups -----------------------------------------------------------------------------------------------------------

    def _solve_now(self, at: int) -> Iterator[Group]:
        station = self.schedule.stations[at]
        for key in self.keys_of(station) if station.all_experts else station.weights[:1]:
            tally = self._pooled(key)
            if key.expert is not None and tally.statistic is not None:
                self._pool(key).merge(tally.statistic)
                if tally.statistic.tokens < TRUSTED * self._weight(key).shape[1]:
                    self._postponed.append(key)
                    continue
            yield self._group(station.weights if key.expert is None else (key,), tally)

    def _solve_postponed(self) -> Iterator[Group]:
        """Repeated weights, cold experts and experts that no token met, in the order of the schedule."""
        for station in self.schedule.stations:
            for key in self.keys_of(station):
                tally = self._known(key, station)
                if station.repeated and tally is not None:
                    yield self._group((key,), tally, "met several times in one forward: pruned last, on all its inputs")
                elif key.expert is not None and (tally is None or key in self._postponed):
                    yield self._cold_group(key, tally)
                    self._tidy_at_times()

    def _pooled(self, key: WeightKey) -> Tally:
        """What all processes know of a weight's inputs; one whose batches never came by adds nothing."""
        tally = self._tally(key)
        tally.pool(self.team)
        return tally

    def _known(self, key: WeightKey, station: Station) -> Tally | None:
        """The same after all stations, where only those of repeated weights were not pooled yet."""
        if station.repeated and self.team.total(key in self._tallies)[0] > 0:
            return self._pooled(key)
        return self._tallies.get(key)

    def _cold_group(self, key: WeightKey, tally: Tally | None) -> Group:
        if self.kind is None:
            return self._group((key,), tally or self._new_tally(key), "met no token")
        own = tally or self._new_tally(key)
        assert own.statistic is not None
        learned = round(own.statistic.tokens)
        own.statistic = mixed(own.statistic, self._pool(key), TRUSTED * self._weight(key).shape[1])
        return self._group((key,), own, f"cold expert ({learned} tokens): its stack's pooled inputs mixed in")

    def _group(self, keys: tuple[WeightKey, ...], tally: Tally, *notes: str) -> Group:
        for statistic in filter(None, (tally.statistic, tally.held)):
            try:
                statistic.check()
            except NumericError as error:
                raise NumericError(f"{keys[0]}: {error}") from None
        weights = [self._weight(key) for key in keys]
        biases = {key: found for key in keys if (found := self._bias(key)) is not None}
        group = Group(keys, weights, tally.statistic, tally.first, tally.tokens, tally.held, biases, tuple(notes))
        tally.statistic = tally.held = tally.first = None
        return group

    def _pool(self, key: WeightKey) -> Statistic:
        """The summed statistic of all experts of a stack, as far as they have been met."""
        if key.parameter not in self._pools:
            weight = self._weight(key)
            assert self.kind is not None
            self._pools[key.parameter] = unpaired(self.kind)(weight.shape[1], weight.device)
        return self._pools[key.parameter]

    def _weight(self, key: WeightKey) -> Tensor:
        parameter = self.parameters[key.parameter].data
        matrix = parameter if key.expert is None else parameter[key.expert]
        return matrix if self.schedule.input_axes[key.parameter] == 1 else matrix.T

    def _bias(self, key: WeightKey) -> tuple[str, Tensor] | None:
        """What the same module adds to the product with a weight."""
        name = key.parameter.removesuffix("weight") + "bias"
        bias = self.parameters.get(name) if key.expert is None else None
        return (name, bias.data) if bias is not None and len(bias) == len(self._weight(key)) else None

    def keys_of(self, station: Station) -> list[WeightKey]:
        """The weights of a station, expert by expert where one product takes all of them."""
        if not station.all_experts:
            return list(station.weights)
        name = station.weights[0].parameter
        return [WeightKey(name, index) for index in range(len(self.parameters[name]))]

    def _new_tally(self, key: WeightKey) -> Tally:
        weight = self._weight(key)
        in_features, device = weight.shape[1], weight.device
        if key.expert is None and self.schedule.stations[self.position[key]].comparable:
            return Tally(in_features, device, self.kind, hold_out=self._holds_out)
        kind = unpaired(self.kind) if self.kind else None
        return Tally(in_features, device, kind, learn_from_all=self.learn_from_all)

    # Coroutines -------------------------------------------------------------------------------------------------------

    def _advance(self, batch: int) -> None:
        """Let a batch go on, or start (again), until it pauses or ends."""
        run = self._live.pop(batch, None) or self._start(batch)
        self._waiting.pop(batch, None)
        self._current = run
        with torch.no_grad(), self.products:
            paused_at = run.coroutine.switch()
        self._current = None
        self._tidy_at_times()
        if run.coroutine.dead:
            self._finish(batch, paused_at)
            if not self._may_rerun:
                self.hidden[batch] = self._results[batch]  # the input is not needed any more: let go of its memory
            return
        self._waiting[batch] = paused_at
        if len(self._live) < self.capacity:
            self._live[batch] = run
        else:
            self._end(run)

    def _tidy_at_times(self) -> None:
        """After a batch that went on, and after an expert's turn, which leave holes alike."""
        self._advances += 1
        if self.tidy is not None and self._advances % TIDY == 0:
            self.tidy()

    def _start(self, batch: int) -> _Run:
        coroutine = greenlet(lambda: self.call(self.layer, self.hidden[batch], batch))
        coroutine.gr_context = contextvars.copy_context()
        return _Run(batch, coroutine, {}, {})

    def _meet(self, product: Product) -> None:
        """Called inside a coroutine, before each product with a watched parameter."""
        run = self._current
        assert run is not None
        at = self.position.get(product.key)
        if at is None:
            raise WalkError(f"{product.key} was met, but the schedule does not know it. Nothing was saved.")
        station, here = self.schedule.stations[at], identity(product.inputs)
        if station.repeated:
            self._count_repeated(at, product, run)
        elif at in run.seen:
            if run.seen[at] != here:
                raise WalkError(f"{product.key} met another input than {station.weights[0]}. Nothing was saved.")
        else:
            run.seen[at] = here
            self._arrive(at, product, run)

    def _arrive(self, at: int, product: Product, run: _Run) -> None:
        """Count the input unless an earlier run of the batch did, and pause unless the weight is finished."""
        if run.batch not in self._counted[at]:
            if at in self._finished:
                if self._started_over:
                    return  # weights that were tuned may send tokens to another expert than before
                raise WalkError(
                    f"{product.key} is pruned already, but met an input it had not seen. Nothing was saved."
                )
            self._count(product, 1, at, run)
        if at in self._finished:
            return
        if torch.is_grad_enabled() or torch.is_autocast_enabled(product.weight.device.type):
            raise WalkError(
                f"{product.key} is multiplied with gradients or autocast on, which would leak to other batches."
            )
        with self.products:
            self._main.switch(at)

    def _count_repeated(self, at: int, product: Product, run: _Run) -> None:
        run.meetings[at] = run.meetings.get(at, 0) + 1
        if self._counted[at].get(run.batch, 0) < run.meetings[at]:
            self._count(product, run.meetings[at], at, run)

    def _count(self, product: Product, times: int, at: int, run: _Run) -> None:
        self._counted[at][run.batch] = times
        station = self.schedule.stations[at]
        keys = self.keys_of(station) if station.all_experts else [product.key]
        dense = self.dense.inputs_at(run.batch, at) if self.dense is not None and station.comparable else None
        if dense is not None and len(dense) != len(product.inputs):
            raise WalkError(
                f"{product.key} met {len(product.inputs)} tokens, but in the dense model {len(dense)}, which the first "
                "window did not show. Nothing was saved. To prune without the dense model's inputs: --no-dense-targets."
            )
        for key, inputs in zip(keys, product.inputs if station.all_experts else [product.inputs], strict=True):
            # An expert that is multiplied with every token has zeros for those that were not sent to it.
            met = inputs[inputs.any(-1)] if station.all_experts else inputs
            self._tally(station.weights[0] if key.expert is None else key).add(
                met, dense, held_out=run.batch in self.held_out
            )

    def _tally(self, key: WeightKey) -> Tally:
        if key not in self._tallies:
            self._tallies[key] = self._new_tally(key)
        return self._tallies[key]

    def _rerun(self) -> None:
        """Run the batches that met a postponed weight once more, now that all weights are finished."""
        late = {self.position.get(key, self.position.get(WeightKey(key.parameter, ALL), -1)) for key in self._postponed}
        late |= {at for at, station in enumerate(self.schedule.stations) if station.repeated}
        batches = {batch for at in late for batch in self._counted.get(at, {})}
        for batch in sorted(batches | self._stale):
            with torch.no_grad():
                self._finish(batch, self.call(self.layer, self.hidden[batch], batch))
            self._tidy_at_times()

    def _finish(self, batch: int, output: Tensor) -> None:
        output = require_finite(output)
        self._results[batch] = self.keep(output) if self.keep is not None else output

    def start_over(self) -> None:
        """Drop every batch that waits: it starts again from the layer's input, through the weights as they are now."""
        for run in self._live.values():
            self._end(run)
        self._live.clear()
        self._started_over = True
        self._stale |= set(self._results)  # they are through: only a run of their own can bring them up to date

    def _end_all(self) -> None:
        for run in [*self._live.values(), *([self._current] if self._current else [])]:
            self._end(run)
        self._current = None
        # This object and its `products` refer to each other, so it may outlive its use for a while.
        mine = (self._live, self._results, self._tallies, self._pools, self.hidden)
        for held in (*mine, self.parameters, self.products.watched):
            held.clear()

    def _end(self, run: _Run) -> None:
        if not run.coroutine.dead:
            with torch.no_grad(), self.products:
                run.coroutine.throw()


def require_finite(output: Tensor) -> Tensor:
    """The hidden states that a layer gives. Raises NumericError if they hold NaN or inf."""
    if not torch.isfinite(output).all():
        raise NumericError("NaN or inf in its output. float16 models overflow easily: try --dtype bfloat16 or float32.")
    return output
