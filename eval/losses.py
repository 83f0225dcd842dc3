"""Cross-entropies of windows under a causal language model, in bounded memory.

Logits are by far the largest thing that a forward makes: one window of 2048 tokens costs 1 GB of them in float32 for a
vocabulary of 128 000. So windows are batched by the memory of their logits, and where one window is too much, the
model's head is applied to its positions in chunks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from llmprune.errors import NumericError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LOGITS_MEMORY", "window_losses"]

LOGITS_MEMORY = 256 * 2**20
"""Bytes of float32 logits held at once; the cross-entropy takes about as much again."""

_MOST_WINDOWS_AT_ONCE = 16  # past this nothing gets faster, and activations grow


def window_losses(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_size: int | None = None,
    logits_memory: int = LOGITS_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The mean cross-entropy (nats, computed in float32) of the L − 1 predictions in each window of `windows` (n, L).

    `batch_size` fixes the windows per forward, else they are as many as `logits_memory` bytes of logits allow. A model
    that cannot be asked for part of its logits (no `logits_to_keep`) is run whole. `progress` is called with (windows
    done, windows in all).

    Raises
    ------
    NumericError
        if a window's loss is NaN or infinite.
    """
    bytes_per_window = windows.shape[1] * _bytes_per_position(model)
    at_once = batch_size or max(1, min(_MOST_WINDOWS_AT_ONCE, logits_memory // bytes_per_window))
    device = _input_device(model)
    losses: list[float] = []
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(windows), at_once):
            losses += _batch_losses(model, windows[start : start + at_once].to(device), logits_memory).tolist()
            _check_finite(losses, start, len(windows))
            if progress is not None:
                progress(len(losses), len(windows))
    return losses


def _batch_losses(model: PreTrainedModel, batch: torch.Tensor, logits_memory: int) -> torch.Tensor:
    """(windows,) float64: the mean cross-entropy of each window of the batch (windows, L)."""
    positions = batch.shape[1] - 1
    chunk = max(1, logits_memory // (len(batch) * _bytes_per_position(model)))
    if chunk > positions or not _gives_part_of_logits(model):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        return _summed_losses(logits, batch[:, 1:]) / positions
    total = torch.zeros(len(batch), dtype=torch.float64)
    with _decoder_once(model):
        for start in range(0, positions, chunk):
            keep = torch.arange(start, min(start + chunk, positions), device=batch.device)
            logits = model(input_ids=batch, use_cache=False, logits_to_keep=keep).logits
            total += _summed_losses(logits, batch[:, keep + 1])
    return total / positions


def _summed_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(windows,) float64 on the CPU: cross-entropy of logits (windows, P, vocabulary) at targets (windows, P)."""
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.to(logits.device).flatten(), reduction="none")
    return each.view(targets.shape).cpu().double().sum(dim=1)


def _gives_part_of_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters and model.base_model is not model


@contextmanager
def _decoder_once(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model's decoder answers every call with its first output.

    So the model's own forward can be asked for its logits chunk by chunk at the price of one decoder run, and whatever
    it does after the decoder (scaling, Gemma-2's soft cap) is done by the model itself. The inputs must stay the same.
    """
    decoder = model.base_model
    own, forward = vars(decoder).get("forward"), decoder.forward
    outputs: list[Any] = []

    def first_output(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    vars(decoder)["forward"] = first_output
    try:
        yield
    finally:
        if own is None:
            del vars(decoder)["forward"]
        else:
            vars(decoder)["forward"] = own


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and afterwards each module in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _bytes_per_position(model: PreTrainedModel) -> int:
    """Float32 logits of one position."""
    return 4 * int(model.config.get_text_config().vocab_size)


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in. Weights that accelerate keeps elsewhere are on "meta"; its hooks move CPU inputs."""
    device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_finite(losses: list[float], start: int, windows: int) -> None:
    for index, loss in enumerate(losses[start:], start + 1):
        if not math.isfinite(loss):
            raise NumericError(
                f"window {index} of {windows}: the cross-entropy is {loss}. The model's weights or activations hold "
                "NaN or overflow; try float32 to tell which."
            )
