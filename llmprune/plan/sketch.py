"""A model drawn from its configuration: everything that decides what is pruned, and none of its weights.

The model is built by transformers with its parameters on "meta", so its structure is the real one. What a layer
multiplies with must be seen in a forward, though: routing and masks decide by values, which "meta" has not. So one
layer of each kind, and what lies outside the layers, gets zeros (memory that is only read is never taken), and the
survey that every run begins with looks at those. All other layers are of a kind that was seen: the same class and
settings, the same parameters, but for the layer's number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmprune.config import PruneConfig
from llmprune.errors import UnsupportedModel
from llmprune.machine import compute_dtype
from llmprune.model import quiet_transformers
from llmprune.model.structure import (
    Decoder,
    check_ignore,
    decoder_of,
    matrices_of,
    max_seq_len,
    skipped_outside,
)
from llmprune.pipeline.survey import Survey, require_some, settled
from llmprune.pipeline.walkable import walkable
from llmprune.plan.counting import Counter, Work
from llmprune.results import SkippedWeight
from llmprune.walk.recorder import record
from llmprune.walk.survey import Schedule, survey_layer

__all__ = ["TOKENS", "Kind", "Sketch", "hollow_model", "sketch"]

TOKENS = 64
"""Tokens of the window that the survey is made with, if the model takes so many."""


@dataclass(frozen=True)
class Kind:
    """Layers that are alike.

    schedule : of all their matrices, ignored or not; its `waiting_bytes` are of one window of `tokens`
    forward : what one layer's forward of that window takes
    """

    schedule: Schedule
    forward: Work
    tokens: int


@dataclass(frozen=True)
class Sketch:
    """A model without its weights, and what will be pruned of it.

    kinds : per decoder layer
    """

    model: Any
    survey: Survey
    kinds: list[Kind]


def hollow_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model of a configuration with its parameters on "meta"."""
    with init_empty_weights(include_buffers=False), quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # accelerate gives every parameter a new object, tied ones too
    return model.eval()


def sketch(model: Any, config: PruneConfig, *, device: torch.device) -> Sketch:
    """Survey a hollow model as a run would survey the loaded one on `device`.

    Raises
    ------
    UnsupportedModel, UserError
        as `llmprune.pipeline.survey_model`, but for what only the weights show.
    """
    check_ignore(model, config.ignore)
    decoder = decoder_of(model)
    _require_own_parameters(decoder)
    signatures = [_signature(layer) for layer in decoder.layers]
    first = {signature: index for index, signature in reversed(list(enumerate(signatures)))}
    with walkable(model), _zeros(model, decoder, first.values(), device), _short_cuts(decoder, signatures, first):
        seen = dict(zip(sorted(first.values()), _survey_kinds(model, decoder, sorted(first.values())), strict=True))
    kinds = [seen[first[signature]] for signature in signatures]
    schedules, skipped = _settled(decoder, kinds, config)
    return Sketch(model, Survey(decoder, schedules, skipped + skipped_outside(model, decoder)), kinds)


def _settled(decoder: Decoder, kinds: list[Kind], config: PruneConfig) -> tuple[list[Schedule], list[SkippedWeight]]:
    schedules: list[Schedule] = []
    skipped: list[SkippedWeight] = []
    for layer, prefix, kind in zip(decoder.layers, decoder.prefixes, kinds, strict=True):
        matrices = matrices_of(layer, prefix, config.ignore)
        ignored = set(kind.schedule.input_axes) - set(matrices.names)
        missing = tuple(name for name in kind.schedule.out_of_reach if name in matrices.names)
        seen = replace(kind.schedule.without(ignored), out_of_reach=missing)
        schedule, dense = settled(layer, prefix, seen, matrices, config)
        schedules.append(schedule)
        skipped += dense
    require_some(schedules)
    return schedules, skipped


def _survey_kinds(model: Any, decoder: Decoder, indices: list[int]) -> list[Kind]:
    """The schedules of these layers, each called as the model calls it, on zeros."""
    layers = [decoder.layers[index] for index in indices]
    ids = torch.zeros(1, min(TOKENS, max_seq_len(model) or TOKENS), dtype=torch.int64)
    recording = record(model, layers, [ids], place=lambda tensor: tensor)
    kinds, hidden = [], recording.hidden[0]
    for at, (index, layer) in enumerate(zip(indices, layers, strict=True)):
        names = matrices_of(layer, decoder.prefixes[index]).names
        call = recording.calls[at][0]
        schedule, _ = survey_layer(layer, lambda module, call=call: call(module, hidden), names)  # type: ignore[misc]
        with torch.no_grad(), Counter() as counter:
            call(layer, hidden)
        kinds.append(Kind(schedule, counter.work, ids.shape[1]))
    return kinds


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """What makes a layer one of its kind: its modules, their plain settings and the shapes of their parameters."""
    return tuple(
        (
            path,
            type(module),
            tuple((name, value) for name, value in sorted(vars(module).items()) if _is_setting(name, value)),
            tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters(recurse=False)),
        )
        for path, module in layer.named_modules()
    )


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, int | float | str) and name not in ("layer_idx", "layer_id", "layer_number", "training")


def _require_own_parameters(decoder: Decoder) -> None:
    owners: dict[int, int] = {}
    for index, layer in enumerate(decoder.layers):
        for name, parameter in layer.named_parameters():
            if (first := owners.setdefault(id(parameter), index)) != index:
                raise UnsupportedModel(
                    f"{decoder.prefixes[index]}{name} is shared with decoder layer {first}. llmprune prunes models "
                    "whose layers have weights of their own."
                )


@contextmanager
def _zeros(model: nn.Module, decoder: Decoder, indices: Iterable[int], device: torch.device) -> Iterator[None]:
    """Zeros for the parameters of these layers and of all that is no layer, in the dtype that computes on `device`."""
    chosen = set(indices)
    left = {module for at, layer in enumerate(decoder.layers) if at not in chosen for module in layer.modules()}
    made: dict[int, nn.Parameter] = {}
    homes: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        if module in left:
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                zeros = torch.zeros(parameter.shape, dtype=compute_dtype(device, parameter.dtype))
                made[id(parameter)] = nn.Parameter(zeros, requires_grad=False)
            homes.append((module, name, parameter))
            module._parameters[name] = made[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in homes:
            module._parameters[name] = parameter


@contextmanager
def _short_cuts(
    decoder: Decoder, signatures: list[tuple[Any, ...]], first: dict[tuple[Any, ...], int]
) -> Iterator[None]:
    """Layers of a kind that was met hand their hidden states on, in the form in which the first one does."""
    forms: dict[tuple[Any, ...], bool] = {}

    def note(signature: tuple[Any, ...]) -> Callable[..., None]:
        return lambda _module, _args, output: forms.update({signature: isinstance(output, tuple)})

    def short_cut(signature: tuple[Any, ...]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return (hidden,) if forms[signature] else hidden

        return forward

    with ExitStack() as stack:
        for index, (layer, signature) in enumerate(zip(decoder.layers, signatures, strict=True)):
            if first[signature] == index:
                stack.callback(layer.register_forward_hook(note(signature)).remove)
            else:
                layer.forward = short_cut(signature)
                stack.callback(vars(layer).pop, "forward", None)
        yield
