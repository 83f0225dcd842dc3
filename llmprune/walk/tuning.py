"""Tuning a part of a layer with its masks fixed, so that it gives what the dense model's part gave.

The solvers make each linear nearly right by itself. Together, with the attention's softmax and the MLP's gate between
them, they can still be better: gradient descent on the kept weights, from the pruned model's inputs to the dense
model's outputs, on the same calibration windows (Wanda++, Yang et al., 2025, https://arxiv.org/abs/2503.04992;
reconstructing attention and MLP apart: Wagner et al., 2025, https://arxiv.org/abs/2510.14444).

Masks are re-applied after every step from the mask that was saved, never from `weight != 0`: a kept weight may pass
through zero. Windows that are held out decide which pass was the best, the one before the first included, so tuning
can end where it began but not in a worse place. A pass that does harm does not end it: the first one has the largest
steps, and one odd window among the held-out ones may make a loss of what the next pass turns into a gain. Only this
part's weights get gradients; what it holds besides the layer is its inputs, the targets and Adam's two moments, in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmprune.errors import WalkError
from llmprune.results import TunedPart
from llmprune.walk.recorder import hidden_of

__all__ = ["Part", "distance", "parts_of", "tune"]

LEARNING_RATE = 1e-4
"""At the first step; falls along a cosine to a tenth of it."""

SCALE = 2.0**14
"""Losses are multiplied by this, and gradients divided by it, where weights are float16: of its numbers none is smaller
than 6e-8, which most gradients would be (Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740)."""


def parts_of(layer: nn.Module, parameters: Sequence[str]) -> dict[str, list[str]]:
    """The parts of a layer to tune, and the names of the pruned parameters in each.

    A part is a child of the layer, such as its attention and its MLP. The whole layer is one part, named "", where
    pruned weights are linears of the layer itself (OPT's fc1 and fc2), or where a child is a mere list of modules,
    which is never called (LongCat-Flash has its two attentions in one).
    """
    parts: dict[str, list[str]] = {}
    for name in parameters:
        child, _, rest = name.partition(".")
        if "." not in rest or isinstance(layer.get_submodule(child), nn.ModuleList | nn.ModuleDict):
            return {"": list(parameters)}
        parts.setdefault(child, []).append(name)
    return parts


class Part:
    """A part of a layer that can be called by itself, as the layer calls it.

    Parameters
    ----------
    layer, name : the layer and the name of its child, or "" for the layer itself
    call : runs the layer on one batch, (layer, hidden, batch number) → hidden states
    """

    def __init__(self, layer: nn.Module, name: str, call: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
        self.layer, self.name, self.call = layer, name, call
        self.module = layer.get_submodule(name)

    def inputs(self, hidden: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """Per batch, a call of the part with what the layer, given these hidden states, calls it with now.

        Raises
        ------
        WalkError
            if the layer does not call it.
        """
        if self.module is self.layer:
            return [partial(self.call, self.layer, states, batch) for batch, states in enumerate(hidden)]
        calls: list[Callable[[], Tensor]] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(lambda: hidden_of(self.module(*args, **kwargs)))
            raise _Seen

        self._run(hidden, self.module.register_forward_pre_hook(keep, with_kwargs=True))
        return calls

    def outputs(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Per batch, what the part gives now. Raises WalkError as `inputs`."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            found.append(hidden_of(output))
            raise _Seen

        self._run(hidden, self.module.register_forward_hook(keep))
        return found

    def _run(self, hidden: Sequence[Tensor], handle: RemovableHandle) -> None:
        try:
            with torch.no_grad():
                for batch, states in enumerate(hidden):
                    with suppress(_Seen):
                        self.call(self.layer, states, batch)
                        raise WalkError(
                            f"it runs without calling its {self.name}, which so cannot be tuned by itself. Nothing was "
                            "saved. To prune without tuning: --tune 0."
                        )
        finally:
            handle.remove()


class _Seen(Exception):
    """What was looked for has come by: the rest of the layer's forward is not needed."""


def tune(
    part: str,
    weights: Sequence[tuple[nn.Parameter, Tensor | None]],
    losses: Sequence[Callable[[], Tensor]],
    *,
    held_out: frozenset[int],
    passes: int,
    dtypes: Sequence[torch.dtype],
    learning_rate: float = LEARNING_RATE,
    progress: Callable[[int, int], None] | None = None,
) -> TunedPart:
    """Adjust `weights` in place. Without a batch that is held out nothing can decide, so there are 0 passes.

    Parameters
    ----------
    weights : parameters and, where they are pruned, their masks (True = kept)
    losses : per batch, computes how far the part is from what it should give
    held_out : batches that are not trained on but decide
    passes : over all batches that are not held out
    dtypes : in which each parameter is stored: it is rounded to it after every step, so what is measured is what is
        saved
    progress : called with (steps done, of how many)
    """
    if not held_out:
        return TunedPart(part, 0.0, 0.0, 0)
    adjusted = [
        _Weight(parameter, parameter.detach().float().clone(), mask, dtype)
        for (parameter, mask), dtype in zip(weights, dtypes, strict=True)
    ]
    masters = [weight.master for weight in adjusted]
    training = [batch for batch in range(len(losses)) if batch not in held_out]
    optimizer = torch.optim.Adam(masters, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    steps = passes * len(training)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / max(1, steps)))

    def measure() -> float:
        with torch.no_grad():
            return sum(losses[batch]().item() for batch in held_out) / len(held_out)

    first = best = measure()
    kept = [master.clone() for master in masters]
    order = torch.Generator().manual_seed(0)
    scale = SCALE if any(parameter.dtype == torch.float16 for parameter, _ in weights) else 1.0
    for again in range(passes):
        for done, at in enumerate(torch.randperm(len(training), generator=order).tolist(), start=1):
            if _step(adjusted, optimizer, losses[training[at]], scale):
                schedule.step()
            else:
                scale /= 2
            if progress is not None:
                progress(again * len(training) + done, steps)
        if (now := measure()) < best:  # and not if it is NaN
            best, kept = now, [master.clone() for master in masters]
    for weight, master in zip(adjusted, kept, strict=True):
        weight.put(master)
    return TunedPart(part, first, best, passes)


@dataclass
class _Weight:
    """A parameter that is tuned, its values before rounding in float32, its mask, and the dtype it is stored in."""

    parameter: nn.Parameter
    master: Tensor
    mask: Tensor | None
    dtype: torch.dtype

    def masked(self, values: Tensor) -> Tensor:
        """The same tensor with what is pruned set to zero."""
        return values if self.mask is None else values.mul_(self.mask)

    def put(self, values: Tensor) -> None:
        """Give the parameter these values, as they will be stored."""
        self.parameter.data.copy_(values.to(self.dtype))


def _step(
    weights: Sequence[_Weight], optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], scale: float
) -> bool:
    """One step of Adam on one batch, in float32, with masks on gradients and on weights; none, and False, if a gradient
    is not finite: Adam would never forget it.

    A weight that the batch does not meet, such as an expert of its own to which no token goes, stays as it is.
    """
    parameters = [weight.parameter for weight in weights]
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss() * scale, parameters, allow_unused=True)
    for parameter, before in zip(parameters, wanted, strict=True):
        parameter.requires_grad_(before)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.master.grad = None if gradient is None else weight.masked(gradient.float() / scale)
    met = [weight.master.grad.sum() for weight in weights if weight.master.grad is not None]
    if met and not torch.stack(met).isfinite().all():
        return False
    optimizer.step()
    for weight in weights:
        weight.put(weight.masked(weight.master))
    return True


def distance(run: Callable[[], Tensor], target: Tensor) -> Tensor:
    """Mean squared error of what `run` gives, relative to the target's mean square."""
    output = run()
    return (output.float() - target.float()).square().mean() / target.float().square().mean().clamp_min(1e-30)


def _cosine(share: float) -> float:
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, share))
