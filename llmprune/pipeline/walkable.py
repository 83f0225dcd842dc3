"""A model made ready to be walked, and what its layers are called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmprune.machine import compute_dtype
from llmprune.model.structure import Decoder
from llmprune.walk.recorder import Recording, record

__all__ = ["caller", "dtype_on", "record_layers", "walkable"]


class walkable:  # noqa: N801 - reads as a word in a with statement
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


def dtype_on(device: torch.device, layer: nn.Module) -> torch.dtype:
    """The dtype in which a layer is computed on `device`."""
    floats = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    return compute_dtype(device, max(set(floats), key=floats.count))


def record_layers(
    model: nn.Module,
    decoder: Decoder,
    batches: Sequence[Tensor],
    device: torch.device,
    *,
    keep: Callable[[Tensor], Tensor] | None = None,
    forms: Sequence[bool] | None = None,
) -> Recording:
    """What every layer is called with on each batch of token ids, placed where layers are computed.

    `keep` and `forms` are as in `record`.
    """
    dtype = dtype_on(device, decoder.layers[0])

    def place(tensor: Tensor) -> Tensor:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(device, dtype if half else tensor.dtype)

    with decoder.surroundings():
        home = next(model.parameters()).device
        ids = [batch.to(home) for batch in batches]
        return record(model, decoder.layers, ids, place=place, keep=keep, forms=forms)


def caller(recording: Recording, index: int) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """Runs a layer on hidden states, as it was called with batch so-and-so: (layer, hidden, batch number)."""
    calls = recording.calls[index]

    def call(layer: nn.Module, hidden: Tensor, batch: int) -> Tensor:
        return calls[batch](layer, hidden.to(next(layer.parameters()).device))  # they may wait in the host's memory

    return call
