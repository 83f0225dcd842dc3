"""What each decoder layer is called with, learned from the model's own forward.

Models disagree about the arguments of their layers: masks, rotary tables, kinds of attention, state that layers share.
So nothing is assumed: every layer's `forward` is replaced by a recorder that keeps the arguments and hands the hidden
states on in the form that the real layer returns. One run of the model then costs an embedding look-up and yields
everything needed to call the layers one by one. `check_replay` proves, before anything is pruned, that layers called
this way compute the model's own forward bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import NumericError, UnsupportedModel

__all__ = ["Call", "Recording", "check_replay", "hidden_of", "record"]


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a layer, with a gap where the hidden states go."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer` on `hidden` (batch, seq_len, hidden_size) and return its hidden states."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        return hidden_of(layer(*args, **kwargs))


@dataclass
class Recording:
    """hidden : per batch, what enters the first layer; calls : per layer, per batch, how it is called."""

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)


class _Recorded(Exception):
    """All layers have been called: the rest of the model's forward is not needed."""


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns: the tensor itself or the first of a tuple.

    Raises
    ------
    UnsupportedModel
        if it is something else.
    """
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor):
        raise UnsupportedModel(
            f"a decoder layer of this model returns a {type(output).__name__}, where llmprune knows hidden states or a "
            "tuple that begins with them."
        )
    return result


def record(
    model: nn.Module,
    layers: Sequence[nn.Module],
    batches: Sequence[Tensor],
    *,
    place: Callable[[Tensor], Tensor],
    keep: Callable[[Tensor], Tensor] | None = None,
    forms: Sequence[bool] | None = None,
) -> Recording:
    """Run the model's forward on each batch of token ids (batch, seq_len) with every layer replaced by a recorder.

    Equal arguments are kept once: the masks of 128 windows would be gigabytes.

    Parameters
    ----------
    place : moves a recorded tensor to where and in which dtype the layers will be computed
    keep : puts the hidden states, which each batch has for itself, where they wait for their turn
    forms : whether each layer returns a tuple, if that is known from `check_replay`; else a short forward tells

    Raises
    ------
    UnsupportedModel
        if a layer is skipped, called twice or out of order, or the model changes the hidden states between layers.
    """
    if forms is None:
        forms = _return_forms(model, layers, batches[0])
    recording, shared = Recording(calls=[[] for _ in layers]), _Shared(place)
    for ids in batches:
        calls = _calls_of(model, layers, forms, ids)
        hidden = place(_take(calls[0]))
        recording.hidden.append(keep(hidden) if keep is not None else hidden)
        for index, call in enumerate(calls):
            recording.calls[index].append(_with_gap(call, shared))
        shared.forget_objects()
    return recording


def check_replay(model: nn.Module, layers: Sequence[nn.Module], ids: Tensor) -> list[bool]:
    """Prove that the layers, called one by one as recorded, compute what the model computes, bit for bit.

    Of the model's own hidden states only digests are kept, so that memory does not grow with the layers.
    Returns for each layer whether it returns a tuple.

    Raises
    ------
    UnsupportedModel
        naming the first layer whose output differs.
    NumericError
        if the dense model itself gives NaN or inf.
    """
    forms = _return_forms(model, layers, ids)
    truth: list[tuple[bool, bytes]] = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: truth.append(_seal(hidden_of(out)))) for layer in layers]
    try:
        _run(model, ids, handles_last=layers[-1])
    finally:
        for handle in handles:
            handle.remove()
    recording = record(model, layers, [ids], place=lambda tensor: tensor, forms=forms)
    hidden = recording.hidden[0]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            hidden = recording.calls[index][0](layer, hidden)
            if not truth[index][0]:
                raise NumericError(
                    f"decoder layer {index} of the dense model gives NaN or inf on the first calibration window. "
                    "float16 models overflow easily: try --dtype bfloat16 or float32. Nothing was changed."
                )
            if _seal(hidden) != truth[index]:
                raise UnsupportedModel(
                    f"decoder layer {index} ({type(layer).__name__}), called by itself, does not compute what the "
                    "model computes, so pruning it by itself would calibrate on wrong inputs. Nothing was changed."
                )
    return forms


def _seal(hidden: Tensor) -> tuple[bool, bytes]:
    """Whether all numbers are finite, and a digest of their bits."""
    raw = hidden.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return bool(torch.isfinite(hidden).all()), hashlib.sha256(raw).digest()


def _run(model: nn.Module, ids: Tensor, *, handles_last: nn.Module | None = None) -> None:
    """The model's forward without cache and gradients, left as soon as the last layer has been called."""

    def leave(*_: Any) -> None:
        raise _Recorded

    handle = handles_last.register_forward_hook(leave) if handles_last is not None else None
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except _Recorded:
        pass
    finally:
        if handle is not None:
            handle.remove()


def _return_forms(model: nn.Module, layers: Sequence[nn.Module], ids: Tensor) -> list[bool]:
    """Whether each layer returns a tuple, from a forward on a few tokens; checks that each runs once and in order."""
    met: list[tuple[nn.Module, bool]] = []
    handles = [
        layer.register_forward_hook(lambda m, _a, out: met.append((m, isinstance(out, tuple)))) for layer in layers
    ]
    try:
        _run(model, ids[:1, :8])
    finally:
        for handle in handles:
            handle.remove()
    if [id(layer) for layer, _ in met] != [id(layer) for layer in layers]:
        raise UnsupportedModel(
            f"{type(model).__name__} calls its {len(layers)} decoder layers {len(met)} times or in another order than "
            "they stand. llmprune prunes models that call each layer once, in order."
        )
    return [is_tuple for _, is_tuple in met]


@dataclass
class _RawCall:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str


def _take(call: _RawCall) -> Tensor:
    value = call.args[call.slot] if isinstance(call.slot, int) else call.kwargs[call.slot]
    assert isinstance(value, Tensor)
    return value


def _calls_of(model: nn.Module, layers: Sequence[nn.Module], forms: Sequence[bool], ids: Tensor) -> list[_RawCall]:
    """One run of the model with recorders in place of its layers."""
    calls: list[_RawCall] = []

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = _take(calls[-1]) if calls else None
            slot = _slot(args, kwargs, before)
            if slot is None:
                raise UnsupportedModel(
                    f"{type(model).__name__} changes the hidden states between decoder layers {index - 1} and {index}, "
                    "so its layers cannot be pruned one by one."
                )
            calls.append(_RawCall(args, kwargs, slot))
            if index + 1 == len(layers):
                raise _Recorded
            hidden = _take(calls[-1])
            return (hidden,) if forms[index] else hidden

        return forward

    with _patched(layers, [recorder(index) for index in range(len(layers))]):
        _run(model, ids)
    return calls


@contextmanager
def _patched(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace each layer's `forward` on the instance, and put back what was there (accelerate patches there too)."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if own is not None:
                layer.forward = own


def _slot(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None) -> int | str | None:
    """Where the hidden states are passed: the very tensor that the layer before returned, or the first tensor."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    matches = (key for key, value in items if isinstance(value, Tensor) and (hidden is None or value is hidden))
    return next(matches, None)


def _with_gap(call: _RawCall, keep: _Shared) -> Call:
    args = tuple(None if i == call.slot else keep(value) for i, value in enumerate(call.args))
    kwargs = {name: None if name == call.slot else keep(value) for name, value in call.kwargs.items()}
    return Call(args, kwargs, call.slot)


class _Shared:
    """Keeps equal tensors once. Lists, dicts and objects pass as they are: layers may share and change them."""

    def __init__(self, place: Callable[[Tensor], Tensor]) -> None:
        self.place = place
        self.kept: dict[tuple[Any, ...], list[Tensor]] = {}
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, tuple) and type(value) is tuple:
            return tuple(self(part) for part in value)
        return self._tensor(value) if isinstance(value, Tensor) else value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.known:  # the same object again, as in every layer of one forward
            return self.known[id(tensor)][1]
        placed = self.place(tensor)
        alike = self.kept.setdefault((placed.shape, placed.dtype, placed.device), [])
        same = next((other for other in alike if torch.equal(other, placed)), None)
        if same is None:
            alike.append(same := placed)
        self.known[id(tensor)] = (tensor, same)  # held, so that its id stays its own
        return same

    def forget_objects(self) -> None:
        """Let go of the originals of one forward; the kept copies stay."""
        self.known.clear()
