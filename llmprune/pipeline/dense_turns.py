"""The dense model, layer by layer, with what an allocation wants to know of each layer.

A layer has its turn while it is resident where it is computed: it can be run, and pruned on trial, and is as it was
before when the next one comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.machine import give_back_memory
from llmprune.pipeline.survey import Survey
from llmprune.pipeline.walkable import caller, dtype_on, record_layers
from llmprune.sparsity.least_squares import refit
from llmprune.sparsity.masks import mask_per_matrix, nm_mask
from llmprune.sparsity.pattern import NM, Pattern
from llmprune.sparsity.statistics import Hessian, Statistic
from llmprune.walk.products import Product, Products
from llmprune.walk.resident import resident
from llmprune.walk.survey import Schedule

__all__ = ["DenseTurn", "dense_turns"]

REFIT_STEPS, DAMPING = 3, 0.03
"""Of the quick refit on trial: few steps, since only the order of the errors matters."""


@dataclass(frozen=True)
class DenseTurn:
    """A layer of the dense model in its turn, resident where it is computed.

    call : one batch of hidden states through the layer, (layer, hidden, batch number)
    inputs, outputs : hidden states of the first batch (batch, seq_len, hidden_size)
    statistics : of the inputs of each parameter
    """

    index: int
    layer: nn.Module
    schedule: Schedule
    call: Callable[[nn.Module, Tensor, int], Tensor]
    inputs: Tensor
    outputs: Tensor
    statistics: dict[str, Statistic]

    def run(self, hidden: Tensor) -> Tensor:
        """The layer, as its weights are now, on hidden states in the place of the first batch."""
        return self.call(self.layer, hidden, 0)

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


def dense_turns(
    model: nn.Module, batches: list[Tensor], survey: Survey, device: torch.device, kind: type[Statistic]
) -> Iterator[DenseTurn]:
    """One layer after the other, with statistics of this kind; to be called without gradients."""
    recording = record_layers(model, survey.decoder, batches, device, forms=survey.forms)
    hidden = recording.hidden
    for index in range(len(survey.decoder.layers)):
        call, schedule = caller(recording, index), survey.schedules[index]
        with survey.decoder.turn(index) as layer, resident(layer, device, dtype_on(device, layer)):
            sums, products = _watched(layer, schedule, kind)
            with products:
                outputs = [call(layer, states, batch) for batch, states in enumerate(hidden)]
            yield DenseTurn(index, layer, schedule, call, hidden[0], outputs[0], sums)
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
