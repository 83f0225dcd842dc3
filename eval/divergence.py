"""How far a pruned model's predictions are from the dense model's, on the same tokens.

Perplexity asks about one token of each distribution, the one that the text has; a pruned model may keep it and still
be another model. The divergence KL(dense ‖ pruned) asks about all tokens, and top-1 agreement how often both would
write the same next token (Dutta et al., 2024, https://arxiv.org/abs/2407.09141: such flips show what accuracy hides).

Both need the dense model's logits where the pruned model's are, and a model is pruned in place. All logits would take
gigabytes (2 MB a token); what goes into the head takes kilobytes, and the head is never pruned. So the dense pass keeps
that, and later the head is applied to it again, within the pruned model's own forward, which scales and caps logits as
ever. Nothing is cut off or sampled: the divergence is over the whole vocabulary. That these really are the dense
model's logits is proved by its cross-entropy in every window, which must be what the dense pass found.
"""

from __future__ import annotations

import math
import statistics
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.errors import UserError
from llmprune.eval.losses import LOGITS_MEMORY, Piece, answering, cross_entropies, window_means
from llmprune.results import percent_with_error, with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DensePass", "Divergence", "mean_with_error"]

_SAME_LOSS = 0.02
"""Nats in a window's mean by which a loss of 16-bit logits may differ when it is computed in other chunks."""


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the dense one, on the tokens of the perplexity beside it."""

    kl: float
    """KL(dense ‖ pruned), nats a token."""
    kl_standard_error: float | None
    """Windows taken as independent; None for a single one."""
    top1_agreement: float
    """The fraction of predictions whose most likely token is the dense model's."""
    top1_standard_error: float | None
    tokens: int
    protocol: str
    """How it was measured, in one sentence."""

    @property
    def kl_text(self) -> str:
        """The divergence with its error, for people."""
        return with_error(self.kl, self.kl_standard_error)

    @property
    def top1_text(self) -> str:
        """The agreement in per cent with its error, for people."""
        return percent_with_error(self.top1_agreement, self.top1_standard_error)


class DensePass:
    """What is left of a dense model on some windows: the inputs of its head, the head itself, and its losses.

    Up to `memory` bytes of inputs are held; beyond that they go to a temporary file.
    """

    def __init__(self, memory: int = LOGITS_MEMORY) -> None:
        self.trouble: str | None = None
        """Why there is nothing to compare with, although the losses were measured."""
        self._file = SpooledTemporaryFile(max_size=memory)  # noqa: SIM115  # closed when this object goes
        weakref.finalize(self, self._file.close)
        self._head: torch.nn.Module | None = None
        self._windows = torch.empty(0, 0, dtype=torch.int64)
        self._losses: list[float] = []
        self._like = torch.empty(0)

    def record(self, model: PreTrainedModel, windows: Tensor, **options: Any) -> list[float]:
        """The losses of the dense model, as `window_losses` gives them, and for later what went into its head."""
        self._head, self._windows = model.get_output_embeddings(), windows
        if not isinstance(self._head, torch.nn.Module):
            self.trouble = "the model has no head of its own"
        means = window_means(model, windows, self._listen, **options)
        self._losses = means[:, 0].tolist()
        return self._losses

    def compare(self, model: PreTrainedModel, windows: Tensor, **options: Any) -> tuple[list[float], Divergence]:
        """Losses of `model` on the same windows, and how far it is from the dense model. `options` as `window_means`.

        Raises
        ------
        UserError
            if the windows or the model's vocabulary are not the dense model's, or its forward makes something else of
            the dense model's head.
        """
        if not torch.equal(windows, self._windows):
            raise UserError(
                "the divergence from the dense model needs the same tokens for both, and their tokenizers make "
                "different ones of this text: compare checkpoints of one model."
            )
        means = window_means(model, windows, self._scores, copies=2, **options)
        self._prove(means[:, 3].tolist())
        kl, agreement = means[:, 1].tolist(), means[:, 2].tolist()
        return means[:, 0].tolist(), Divergence(
            *mean_with_error(kl),
            *mean_with_error(agreement),
            tokens=windows.numel() - len(windows),
            protocol="KL(dense ‖ pruned) over the whole vocabulary in float32, and how often both models' most likely "
            "token is the same, at every prediction of the perplexity; ± over windows.",
        )

    def _listen(self, piece: Piece) -> Tensor:
        if self.trouble is not None:
            return cross_entropies(piece.logits(), piece.targets)[:, None]
        assert self._head is not None
        own, seen = self._head.forward, []

        def noting(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(states)
            return own(states, *args, **kwargs)

        with answering(self._head, noting):
            losses = cross_entropies(piece.logits(), piece.targets)[:, None]
        if len(seen) == 1 and seen[0].shape[:2] in ((len(piece.ids), piece.positions), piece.ids.shape):
            self._keep(piece, seen[0][:, : piece.positions])
        else:
            self.trouble = "the model does not call its head once with one state a token"
        return losses

    def _scores(self, piece: Piece) -> Tensor:
        """(rows, 4): sums of cross-entropy, KL divergence, agreement, and the dense model's cross-entropy."""
        pruned = piece.logits().float()
        dense = self._dense_logits(piece).float()
        if dense.shape != pruned.shape:
            raise UserError(
                f"the dense model has {dense.shape[-1]:,} tokens in its vocabulary and this one {pruned.shape[-1]:,}: "
                "compare checkpoints of one model."
            )
        same = (dense.argmax(-1) == pruned.argmax(-1)).sum(dim=-1)
        losses = [cross_entropies(logits, piece.targets) for logits in (pruned, dense)]
        wanted = dense.log_softmax(-1)
        kl = F.kl_div(pruned.log_softmax(-1), wanted, reduction="none", log_target=True)
        kl.masked_fill_(wanted == -math.inf, 0)  # p · log p goes to 0 with p, where floats make NaN of it
        kl = kl.sum(dim=-1).double().sum(dim=-1)
        return torch.stack([losses[0], kl.cpu(), same.cpu().double(), losses[1]], dim=1)

    def _dense_logits(self, piece: Piece) -> Tensor:
        """What the model's forward makes of the dense model's head on the dense model's states."""
        assert self._head is not None
        dense, head = self._head.forward, piece.model.get_output_embeddings()
        states = self._kept(piece)

        def speaking_for_it(own: Tensor, *args: Any, **kwargs: Any) -> Any:
            unasked = own.shape[1] - states.shape[1]  # a model that is run whole has a last position too
            return dense(F.pad(states.to(own.device), (0, 0, 0, unasked)), *args, **kwargs)

        with answering(head, speaking_for_it):
            return piece.logits()

    def _keep(self, piece: Piece, states: Tensor) -> None:
        """Write states (rows, positions, width) to their places: the file holds (windows, L − 1, width)."""
        self._like = states.new_empty(0, states.shape[-1], device="cpu")
        for row, state in enumerate(states.detach().cpu().contiguous(), piece.row):
            self._file.seek(self._place(row, piece))
            try:
                self._file.write(state.view(torch.uint8).numpy().tobytes())
            except OSError as error:
                raise UserError(
                    f"the states of the dense model do not fit into the folder for temporary files: {error.strerror}. "
                    "Measure less (--eval-tokens, --tokens), or let TMPDIR name a folder with more room."
                ) from error

    def _kept(self, piece: Piece) -> Tensor:
        rows = []
        size = piece.positions * self._like.shape[-1] * self._like.element_size()
        for row in range(piece.row, piece.row + len(piece.ids)):
            self._file.seek(self._place(row, piece))
            rows.append(torch.frombuffer(bytearray(self._file.read(size)), dtype=self._like.dtype))
        return torch.stack(rows).view(len(rows), piece.positions, -1)

    def _place(self, row: int, piece: Piece) -> int:
        position = row * (piece.ids.shape[1] - 1) + piece.start
        return position * self._like.shape[-1] * self._like.element_size()

    def _prove(self, losses: Iterable[float]) -> None:
        for window, (again, was) in enumerate(zip(losses, self._losses, strict=True), 1):
            if not math.isclose(again, was, rel_tol=1e-3, abs_tol=_SAME_LOSS):
                raise UserError(
                    "this model makes something else of its head's output than the dense one, so the divergence would "
                    f"be wrong: the dense model's cross-entropy in window {window} was {was:.4f} and comes out as "
                    f"{again:.4f}. Compare checkpoints of one model."
                )


def mean_with_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error, values taken as independent; None for a single one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
