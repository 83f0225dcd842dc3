"""Aim at the dense model's outputs, although the inputs have changed.

A linear behind pruned layers gets X where the dense model would give it X_d. Which weight makes X W*ᵀ nearest to
X_d Wᵀ? With H = XᵀX / tokens, C = (X_d − X)ᵀX / tokens and a pull λ towards W it is

    W* = W + S,    S = W C (H + λI)⁻¹

(for quantization: GPTAQ, Li et al., 2025, https://arxiv.org/abs/2504.02692; for pruning, inside a layer: FISTAPruner,
Zhao et al., 2024, https://arxiv.org/abs/2408.03728). Whatever is solved for W afterwards is solved for W* instead, so
no method needs to know. But the shift is learned from few tokens, and taken whole with a small λ it can ruin a model.
So λ and a step along S are chosen on windows that S was not learned from: the error there is a parabola in the step,
and its lowest point between 0 and 1 can be no worse than no shift at all. Then S is computed once more, from all
windows, unless these must stay unseen.

Of the step that the held-out windows ask for only a share is taken. These windows are of the calibration text; what
is fitted to it linear by linear costs other text more than it gains, and the errors add up from layer to layer. On a
parabola any step between none and twice the best is still a gain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.sparsity.least_squares import damped
from llmprune.sparsity.parts import Pooled, alone
from llmprune.sparsity.statistics import PairedHessian

__all__ = ["Shift", "shifted_target"]

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Values of λ that are tried, as fractions of H's mean diagonal."""

SHARE = 0.4
"""Of the best step. Chosen on SmolLM2-135M at 2:4, by text in none of our tables (WikiText-2's validation part):
a quarter did as well there, 0.7 and the whole step worse, in this order."""


SAMPLE = 128
"""Output rows, about, on which λ is chosen: it is one number for all of them. The step is chosen on all."""


@dataclass(frozen=True)
class Shift:
    """A target and how it was chosen.

    target : (out_features, in_features) float32, W + step · S
    step : between 0 and 1, for each linear of a stack
    dampening_frac : the λ that did best on the held-out windows
    gain : by how much the held-out error ‖X_d Wᵀ − X W*ᵀ‖² a token is smaller than with W; 0 = no gain
    """

    target: Tensor
    step: tuple[float, ...]
    dampening_frac: float
    gain: float


def shifted_target(
    weight: Tensor,
    known: PairedHessian,
    held: PairedHessian,
    rows: list[int],
    *,
    learn_from_all: bool = True,
    share: float = SHARE,
    pooled: Pooled = alone,
) -> Shift:
    """The weight that should be approached in place of `weight`.

    Parameters
    ----------
    weight : (out_features, in_features) float32, of the dense model; several linears may be stacked
    known : statistic of the windows to learn from; its cross moments are used up
    held : statistic of other windows, to choose λ and the step on; used up
    rows : output rows of each stacked linear: each has a step of its own
    share : of the best step, that is taken
    pooled : adds up the rows of each linear over all parts of a divided stack
    learn_from_all : whether S itself is computed once more with the held-out windows, which `known` has then, too
    """
    wanted, learned = held.missing(weight), known.missing(weight)
    held_hessian, hessian = held.matrix, known.matrix
    some, rows_of_some = _sample(rows, weight.device)
    best_gain, best_frac = 0.0, DAMPINGS[-1]
    for fraction in DAMPINGS:
        shift = _shift(learned[some], hessian, fraction)
        _, gain = _best_step(shift, wanted[some], held_hessian, rows_of_some, share=share, pooled=pooled)
        if gain > best_gain:
            best_gain, best_frac = gain, fraction
    shift = _shift(learned, hessian, best_frac)
    best_step, best_gain = _best_step(shift, wanted, held_hessian, rows, share=share, pooled=pooled)
    del held_hessian, hessian  # each may be larger than the weight
    if learn_from_all:
        known.merge(held)
    if not best_gain > 0:  # nor where it is NaN
        return Shift(weight, (0.0,) * len(rows), best_frac, 0.0)
    if learn_from_all:
        learned.lerp_(wanted, held.tokens / known.tokens)
        shift = _shift(learned, known.matrix, best_frac)
    steps = best_step.repeat_interleave(torch.tensor(rows, device=weight.device))
    return Shift(weight + steps[:, None] * shift, tuple(best_step.tolist()), best_frac, best_gain)


def _shift(learned: Tensor, hessian: Tensor, fraction: float) -> Tensor:
    """S (H + λI) = W C for some rows of W C, (rows, in_features).

    Where rounding has left H + λI not positive definite, there is no shift to trust: S is 0, and gains nothing.
    """
    lower, failed = torch.linalg.cholesky_ex(damped(hessian.clone(), fraction))
    if failed:
        return torch.zeros_like(learned)
    # From the right, as rows lie: on a CPU that is faster than cholesky_solve on the columns.
    half = torch.linalg.solve_triangular(lower.mT, learned, upper=True, left=False)
    shift: Tensor = torch.linalg.solve_triangular(lower, half, upper=False, left=False)
    return shift


def _best_step(
    shift: Tensor, wanted: Tensor, held_hessian: Tensor, rows: list[int], *, share: float, pooled: Pooled
) -> tuple[Tensor, float]:
    """A share of the step along S at which ‖R − step · X Sᵀ‖² is lowest, R = (X_d − X) Wᵀ on the held-out windows, for
    each linear; and how much all of them gain by it."""
    along = pooled(_per_linear((wanted * shift).sum(1), rows))
    square = pooled(_per_linear(((shift @ held_hessian) * shift).sum(1), rows))
    step = share * (along / square.clamp_min(1e-30)).clamp(0, 1)
    return step, float((2 * step * along - step.square() * square).sum())


def _sample(rows: list[int], device: torch.device) -> tuple[Tensor, list[int]]:
    """Some output rows of a stack, evenly spread, and how many of each linear they are."""
    every = max(1, sum(rows) // SAMPLE)
    some = torch.arange(0, sum(rows), every, device=device)
    ends = torch.tensor([0, *rows], device=device).cumsum(0)
    return some, torch.searchsorted(some, ends).diff().tolist()


def _per_linear(per_row: Tensor, rows: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in per_row.split(rows)])
