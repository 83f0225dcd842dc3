"""Distillation: all kept weights together, towards the dense model's own predictions.

Layer by layer each repair is blind to what the next layers do with its error. Where the whole model fits in memory
several times over, the last step needs no such blindness: gradient descent on the divergence between the dense model's
next-token distribution and the pruned one's, on the calibration windows, masks fixed. What the dense model predicts is
written down before it is pruned: its most likely tokens at every position and the rest of the probability in one sum,
so that no second model is needed. The divergence over these classes never exceeds the full one.

Windows held out decide which pass was the best, none included, as in `walk/tuning.py`, whose loop this is. Where the
machine multiplies in bfloat16, the passes do (the weights that are adjusted stay float32), which halves their time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.machine import compute_dtype
from llmprune.results import TunedPart
from llmprune.walk.tuning import tune

__all__ = ["HELD_BYTES", "Predictions", "distill", "divergence", "predictions"]

HELD_BYTES = 5 * 4
"""For each pruned weight: itself, the best of it so far, its gradient and Adam's two moments, in float32."""

TOP = 128
"""Most likely tokens that are written down at each position."""

LEARNING_RATE = 1e-4
"""At the first step; see `walk/tuning.py` for how it falls."""


@dataclass(frozen=True)
class Predictions:
    """What a model expects next, at every position of a batch.

    tokens : the most likely ones, (batch, seq_len, TOP) int32
    logs : their log-probabilities, (batch, seq_len, TOP) float16
    """

    tokens: Tensor
    logs: Tensor


def predictions(model: nn.Module, batches: Sequence[Tensor]) -> list[Predictions]:
    """Per batch of token ids (batch, seq_len), what the model expects next: TOP · 6 bytes a token, on the CPU."""
    found = []
    with torch.no_grad():
        for ids in batches:
            logs = _logits(model, ids).float().log_softmax(-1)
            top = logs.topk(min(TOP, logs.shape[-1]))
            found.append(Predictions(top.indices.int().cpu(), top.values.half().cpu()))
    return found


def divergence(logits: Tensor, wanted: Predictions) -> Tensor:
    """Mean KL divergence, in nats a token, of the model's distribution from the wanted one.

    Parameters
    ----------
    logits : (batch, seq_len, vocabulary)
    """
    logs = logits.float().log_softmax(-1).gather(-1, wanted.tokens.to(logits.device, torch.int64))
    truth = wanted.logs.to(logits.device).float()
    rest, rest_truth = _log_of_rest(logs), _log_of_rest(truth)
    seen = (truth.exp() * (truth - logs)).sum(-1)
    return (seen + rest_truth.exp() * (rest_truth - rest)).mean()


def distill(
    model: nn.Module,
    batches: Sequence[Tensor],
    wanted: Sequence[Predictions],
    *,
    masks: Mapping[str, Tensor],
    held_out: frozenset[int],
    passes: int,
    progress: Callable[[int, int], None] | None = None,
) -> TunedPart:
    """Adjust the pruned parameters of `model` in place, each in its own dtype.

    Parameters
    ----------
    masks : by name of a parameter, what is kept of it (True), of the parameter's own shape
    wanted : of the dense model, per batch
    held_out : batches that are not trained on but decide
    progress : called with (steps done, of how many)
    """
    parameters = dict(model.named_parameters())
    losses = [partial(_loss, model, ids, target) for ids, target in zip(batches, wanted, strict=True)]
    dtypes = [parameters[name].dtype for name in masks]
    with _no_float16_on_a_cpu(model):
        return tune(
            "model",
            [(parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()],
            losses,
            held_out=held_out,
            passes=passes,
            dtypes=dtypes,
            learning_rate=LEARNING_RATE,
            progress=progress,
        )


@contextmanager
def _no_float16_on_a_cpu(model: nn.Module) -> Iterator[None]:
    """float16 as float32 for a `with` block: norms on a CPU do not take it beside bfloat16, and products are slow."""
    tensors = [each for each in (*model.parameters(), *model.buffers()) if each.dtype == torch.float16]
    tensors = [each for each in tensors if each.device.type == "cpu"]
    for tensor in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.half()


def _loss(model: nn.Module, ids: Tensor, wanted: Predictions) -> Tensor:
    device = next(model.parameters()).device
    fast = compute_dtype(device, torch.bfloat16) == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=fast):
        logits = _logits(model, ids)
    return divergence(logits, wanted)


def _logits(model: Any, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits


def _log_of_rest(logs: Tensor) -> Tensor:
    """Log of the probability that is not in the listed classes; a little is always left, so that it is finite."""
    return (1 - logs.exp().sum(-1)).clamp_min(1e-6).log()
