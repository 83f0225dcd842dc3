"""What a causal language model makes of windows of tokens, in bounded memory.

Logits are by far the largest thing that a forward makes: one window of 2048 tokens costs 1 GB of them in float32 for a
vocabulary of 128 000. So windows are batched by the memory of their logits, and where one window is too much, the
model's head is applied to its positions in chunks. Whatever is measured is a mean over positions of some score, so a
measure says only what the score of a `Piece` is: some positions of some windows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from llmprune.errors import NumericError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LOGITS_MEMORY",
    "Piece",
    "answering",
    "cross_entropies",
    "evaluating",
    "input_device",
    "memory_named",
    "window_losses",
    "window_means",
]

LOGITS_MEMORY = 256 * 2**20
"""Bytes of float32 logits held at once; what is computed from them takes about as much again."""

_MOST_WINDOWS_AT_ONCE = 16  # past this nothing gets faster, and activations grow

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1, "": 1}


@dataclass(frozen=True)
class Piece:
    """The positions `start` to `stop` (not included) of a batch of windows `ids` (rows, L), whose first is `row`."""

    row: int
    ids: torch.Tensor
    start: int
    stop: int
    model: PreTrainedModel
    whole: bool
    """Whether the model has to be run for all of its logits at once."""

    @property
    def positions(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def targets(self) -> torch.Tensor:
        """(rows, positions): the tokens that come next."""
        return self.ids[:, self.start + 1 : self.stop + 1]

    def logits(self) -> torch.Tensor:
        """(rows, positions, vocabulary), by the model's own forward, whose decoder runs once for all pieces."""
        if self.whole:
            logits: torch.Tensor = self.model(input_ids=self.ids, use_cache=False).logits
            return logits[:, self.start : self.stop]
        keep = torch.arange(self.start, self.stop, device=self.ids.device)
        logits = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=keep).logits
        return logits


Score = Callable[[Piece], torch.Tensor]
"""(rows, columns) float64 on the CPU: sums over the positions of a piece, the cross-entropy in column 0."""


def window_losses(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_size: int | None = None,
    logits_memory: int = LOGITS_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The mean cross-entropy (nats, computed in float32) of the L − 1 predictions in each window of `windows` (n, L).

    Arguments and errors as in `window_means`.
    """
    means = window_means(
        model,
        windows,
        lambda piece: cross_entropies(piece.logits(), piece.targets)[:, None],
        batch_size=batch_size,
        logits_memory=logits_memory,
        progress=progress,
    )
    losses: list[float] = means[:, 0].tolist()
    return losses


def window_means(
    model: PreTrainedModel,
    windows: torch.Tensor,
    score: Score,
    *,
    copies: int = 1,
    batch_size: int | None = None,
    logits_memory: int = LOGITS_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """(n, columns) float64: the mean of `score` over the L − 1 predictions in each window of `windows` (n, L).

    `copies` is how many sets of logits the score holds at once. `batch_size` fixes the windows per forward, else they
    are as many as `logits_memory` bytes of logits allow. A model that cannot be asked for part of its logits (no
    `logits_to_keep`) is run whole. `progress` is called with (windows done, windows in all).

    Raises
    ------
    NumericError
        if a window's loss, or whatever else is measured, is NaN or infinite.
    """
    bytes_per_position = copies * _bytes_per_position(model)
    at_once = batch_size or max(1, min(_MOST_WINDOWS_AT_ONCE, logits_memory // (windows.shape[1] * bytes_per_position)))
    device = input_device(model)
    found: list[torch.Tensor] = []
    with evaluating(model), torch.no_grad():
        for row in range(0, len(windows), at_once):
            batch = windows[row : row + at_once].to(device)
            chunk = max(1, logits_memory // (len(batch) * bytes_per_position))
            with _decoder_once(model):
                sums = [score(piece) for piece in _pieces(model, batch, row, chunk)]
            found.append(torch.stack(sums).sum(dim=0) / (windows.shape[1] - 1))
            _check_finite(found[-1], row, len(windows))
            if progress is not None:
                progress(row + len(batch), len(windows))
    return torch.cat(found)


def _pieces(model: PreTrainedModel, batch: torch.Tensor, row: int, chunk: int) -> Iterator[Piece]:
    """All positions that predict something, `chunk` at a time where the model can be asked for part of its logits."""
    positions = batch.shape[1] - 1
    if chunk > positions or not _gives_part_of_logits(model):
        yield Piece(row, batch, 0, positions, model, whole=True)
        return
    for start in range(0, positions, chunk):
        yield Piece(row, batch, start, min(start + chunk, positions), model, whole=False)


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(rows,) float64 on the CPU: cross-entropy of logits (rows, P, vocabulary) at targets (rows, P), summed over P."""
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.to(logits.device).flatten(), reduction="none")
    return each.view(targets.shape).cpu().double().sum(dim=1)


def memory_named(written: str) -> int:
    """Bytes, from a number with a unit: "256MB", "1GiB".

    Raises
    ------
    UserError
        if it is none, or less than a byte.
    """
    text = written.strip().lower()
    number = text.rstrip("kmgib ")
    unit = text[len(number) :].strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"--logits-memory is a number of bytes with a unit, such as 256MB or 1GiB; got {written!r}.")
    return size


def _gives_part_of_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters and model.base_model is not model


@contextmanager
def _decoder_once(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model's decoder answers every call with its first output.

    So the model's own forward can be asked for its logits chunk by chunk at the price of one decoder run, and whatever
    it does after the decoder (scaling, Gemma-2's soft cap) is done by the model itself. The inputs must stay the same.
    """
    if model.base_model is model:  # there is no decoder to be told from it
        yield
        return
    forward = model.base_model.forward
    outputs: list[Any] = []

    def first_output(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    with answering(model.base_model, first_output):
        yield


@contextmanager
def answering(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this block `forward` answers in the place of `module`'s own, which may be a patch of accelerate's."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
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


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in. Weights that accelerate keeps elsewhere are on "meta"; its hooks move CPU inputs."""
    device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_finite(means: torch.Tensor, row: int, windows: int) -> None:
    for index, (loss, *others) in enumerate(means.tolist(), row + 1):
        if not math.isfinite(loss):
            raise NumericError(
                f"window {index} of {windows}: the cross-entropy is {loss}. The model's weights or activations hold "
                "NaN or overflow; try float32 to tell which."
            )
        for other in others:
            if not math.isfinite(other):
                raise NumericError(
                    f"window {index} of {windows}: what is measured against the dense model is {other}, so one of the "
                    "two models gives NaN, or no chance at all to a token that the other one expects."
                )
