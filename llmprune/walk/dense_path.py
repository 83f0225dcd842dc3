"""The dense model beside the one that is being pruned: what would the inputs be if nothing had been pruned?

A layer after pruned layers gets other inputs than it was made for. To make up for that, a linear must know both: what
it gets, and what the dense model would have given it. So each batch runs through the layer twice, with its pruned
weights and with the original ones, on the hidden states that the dense layers before left. The dense run is a
coroutine too; it is asked for its inputs at a station when the pruned run has arrived there, and rests there until the
next question. It lives on copies of the original weights, which take the parameters' place for its turns only, so it
can be dropped and started again at any time, whatever has been pruned meanwhile.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmprune.errors import WalkError
from llmprune.walk.products import Product, Products
from llmprune.walk.survey import Schedule

__all__ = ["DensePath"]

TO_THE_END = -1


@dataclass
class _Run:
    """One dense forward of one batch, and the station at which it shall pause."""

    coroutine: greenlet
    until: int


class DensePath:
    """The original layer, run station by station.

    Parameters
    ----------
    layer : the decoder layer, resident where it is computed, not pruned yet
    hidden : per batch, the hidden states that the dense model gives it (batch, seq_len, hidden_size)
    call : runs the layer on one batch, (layer, hidden, batch number) → hidden states; with state of its own, where
        layers share any
    schedule : of the layer's weights that are to be pruned
    capacity : how many batches may rest at once; the others start again each time
    """

    def __init__(
        self,
        layer: nn.Module,
        hidden: list[Tensor],
        call: Callable[[nn.Module, Tensor, int], Tensor],
        schedule: Schedule,
        *,
        capacity: int,
    ) -> None:
        self.layer, self.hidden, self.call, self.capacity = layer, hidden, call, capacity
        self.parameters = dict(layer.named_parameters())
        self.stations = {
            key.parameter: at
            for at, station in enumerate(schedule.stations)
            if station.comparable
            for key in station.weights
        }
        changing = {key.parameter for station in schedule.stations for key in station.weights}
        changing |= {name for name in self.parameters if name.endswith("bias")}
        self.original = {name: self.parameters[name].data.clone() for name in changing}
        watched = [(name, self.original[name]) for name in self.stations]
        self.products = Products(watched, self._meet)
        self._live: dict[int, _Run] = {}
        self._current: _Run | None = None
        self._caller = getcurrent()

    def inputs_at(self, batch: int, at: int) -> Tensor:
        """The dense inputs (tokens, in_features) of a batch at station `at`; stations are asked for in order.

        Raises
        ------
        WalkError
            if the dense forward does not come by there.
        """
        run = self._live.pop(batch, None) or self._start(batch)
        run.until = at
        met = self._switch(run)
        if run.coroutine.dead:
            raise WalkError("the dense model does not multiply where the pruned one does. Nothing was saved.")
        if len(self._live) < self.capacity:
            self._live[batch] = run
        else:
            self._end(run)
        return met

    def outputs(self, keep: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """What the dense layer gives, per batch, put away by `keep`; takes the place of the inputs."""
        for batch in range(len(self.hidden)):
            run = self._live.pop(batch, None) or self._start(batch)
            run.until = TO_THE_END
            output = self._switch(run)
            self.hidden[batch] = keep(output) if keep is not None else output
        return self.hidden

    def original_of(self, name: str) -> Tensor:
        """A parameter as it was before the layer was pruned."""
        return self.original.get(name, self.parameters[name].data)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The layer with its original weights, for a `with` block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def close(self) -> None:
        """End all coroutines, and let go of the weights: this object and its `products` refer to each other."""
        for run in self._live.values():
            self._end(run)
        for held in (self._live, self.parameters, self.original, self.products.watched):
            held.clear()

    def _exchange(self) -> None:
        for name, original in self.original.items():
            parameter = self.parameters[name]
            parameter.data, self.original[name] = original, parameter.data

    def _start(self, batch: int) -> _Run:
        coroutine = greenlet(lambda: self.call(self.layer, self.hidden[batch], batch))
        coroutine.gr_context = contextvars.copy_context()
        return _Run(coroutine, TO_THE_END)

    def _switch(self, run: _Run) -> Tensor:
        """Let a dense run go on, from inside whatever coroutine asks, until it pauses or ends."""
        self._current, self._caller = run, getcurrent()
        run.coroutine.parent = self._caller
        try:
            with torch.no_grad(), self.in_place(), self.products:
                result: Tensor = run.coroutine.switch()
        finally:
            self._current = None
        return result

    def _meet(self, product: Product) -> None:
        run = self._current
        assert run is not None
        if self.stations[product.key.parameter] == run.until:
            with self.products:
                self._caller.switch(product.inputs)

    def _end(self, run: _Run) -> None:
        if run.coroutine.dead:
            return
        run.coroutine.parent = getcurrent()
        with torch.no_grad(), self.in_place(), self.products:
            run.coroutine.throw()
