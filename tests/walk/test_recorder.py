"""What layers are called with, and the proof that calling them one by one is the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.errors import UnsupportedModel
from llmprune.model import find_decoder
from llmprune.walk.recorder import check_replay, record
from tests.builders import FAMILIES, tiny_model


def ids(count: int = 3, length: int = 20) -> Tensor:
    return torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(0))


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_called_one_by_one_are_the_models_own_forward(family: str) -> None:
    model: Any = tiny_model(family)
    layers = find_decoder(model).layers
    check_replay(model, layers, ids()[:1])
    recording = record(model, layers, [ids()], place=as_it_is)
    truth: list[Tensor] = []
    norm = next(module for name, module in model.named_modules() if name.endswith(("model.norm", "ln_f")))
    handle = norm.register_forward_pre_hook(lambda _m, args: truth.append(args[0]))
    with torch.no_grad():
        model(ids(), use_cache=False)
        handle.remove()
        hidden = recording.hidden[0]
        for layer, calls in zip(layers, recording.calls, strict=True):
            hidden = calls[0](layer, hidden)
    assert torch.equal(hidden, truth[0])


def test_equal_arguments_are_kept_once() -> None:
    model: Any = tiny_model("llama")
    recording = record(model, find_decoder(model).layers, [ids(1), ids(1), ids(1)], place=as_it_is)
    rotary = [call.kwargs["position_embeddings"] for calls in recording.calls for call in calls]
    assert len(rotary) == 6
    assert len({id(cos) for cos, _ in rotary}) == 1


def test_different_arguments_are_kept_apart() -> None:
    model: Any = tiny_model("llama")
    recording = record(model, find_decoder(model).layers, [ids(1, 20), ids(1, 12)], place=as_it_is)
    lengths = [call.kwargs["position_embeddings"][0].shape[1] for call in recording.calls[0]]
    assert lengths == [20, 12]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_recording_leaves_no_patch_behind_even_when_it_fails(family: str) -> None:
    model: Any = tiny_model(family)
    layers = find_decoder(model).layers
    before = [dict(vars(layer)) for layer in layers]

    def fail(_tensor: Tensor) -> Tensor:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        record(model, layers, [ids(1)], place=fail)
    record(model, layers, [ids(1)], place=as_it_is)
    assert [dict(vars(layer)) for layer in layers] == before
    assert not any(layer._forward_hooks for layer in layers)


def test_a_forward_that_was_patched_before_is_put_back() -> None:
    """accelerate patches `forward` on the instance too."""
    model: Any = tiny_model("llama")
    layers = find_decoder(model).layers
    own = layers[0].forward
    layers[0].forward = patched = lambda *args, **kwargs: own(*args, **kwargs)
    record(model, layers, [ids(1)], place=as_it_is)
    assert layers[0].forward is patched


def test_a_layer_that_remembers_its_last_call_is_refused() -> None:
    model: Any = tiny_model("llama")
    layers = find_decoder(model).layers
    own, calls = layers[1].forward, []

    def forward(hidden: Tensor, **kwargs: Any) -> Tensor:
        calls.append(1)
        return own(hidden, **kwargs) + len(calls)  # type: ignore[no-any-return]

    layers[1].forward = forward
    with pytest.raises(UnsupportedModel, match=r"decoder layer 1 \(LlamaDecoderLayer\)"):
        check_replay(model, layers, ids(1))


def test_a_layer_that_is_called_twice_is_refused() -> None:
    model: Any = tiny_model("llama")
    layers = find_decoder(model).layers
    model.model.layers = torch.nn.ModuleList([layers[0], layers[1], layers[0]])
    model.config.num_hidden_layers = 3
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(UnsupportedModel, match="3 times"):
        record(model, layers, [ids(1)], place=as_it_is)
