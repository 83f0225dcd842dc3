"""Freedoms are found in every family of models, by trying, and what is found can be trusted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmprune.model import find_decoder
from llmprune.model.freedom import Freedom, Known, Site, apply, find_freedoms, prove
from llmprune.model.structure import matrices_of
from llmprune.pipeline.walkable import walkable
from llmprune.walk.recorder import record
from llmprune.walk.survey import survey_layer
from tests.test_conformance import IDS, tiny

Layers = list[tuple[nn.Module, Callable[[nn.Module], Tensor], dict[str, int]]]

# consumer → (value heads, query heads sharing one, head_dim) and what moves with it.
ATTENTION = {"self_attn.o_proj": ((2, 2, 8), ("self_attn.v_proj.weight",))}
FEED_FORWARD = {"mlp.down_proj": ((1, 1, 48), ("mlp.gate_proj.weight", "mlp.up_proj.weight"))}
EXPERTS = {"mlp.experts.down_proj": ((1, 1, 48), ("mlp.experts.gate_up_proj",))}
SMALL_EXPERTS = {"mlp.experts.down_proj": ((1, 1, 16), ("mlp.experts.gate_up_proj",))}
FUSED = "attention.query_key_value"
EXPECTED: dict[str, dict[str, tuple[tuple[int, ...], tuple[str, ...]]]] = {
    "gpt2": {
        "attn.c_proj": ((4, 1, 8), ("attn.c_attn.weight", "attn.c_attn.bias")),
        "mlp.c_proj": ((1, 1, 128), ("mlp.c_fc.weight", "mlp.c_fc.bias")),
    },
    "opt": {
        "self_attn.out_proj": ((4, 1, 8), ("self_attn.v_proj.weight", "self_attn.v_proj.bias")),
        "fc2": ((1, 1, 48), ("fc1.weight", "fc1.bias")),
    },
    "gpt_neox": {
        "attention.dense": ((4, 1, 8), (f"{FUSED}.weight", f"{FUSED}.bias")),
        "mlp.dense_4h_to_h": ((1, 1, 48), ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias")),
    },
    "bloom": {
        "self_attention.dense": ((4, 1, 8), (f"self_{FUSED}.weight", f"self_{FUSED}.bias")),
        "mlp.dense_4h_to_h": ((1, 1, 128), ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias")),
    },
    "falcon": {
        "self_attention.dense": ((1, 4, 8), (f"self_{FUSED}.weight",)),
        "mlp.dense_4h_to_h": ((1, 1, 128), ("mlp.dense_h_to_4h.weight",)),
    },
    **{name: {**ATTENTION, **FEED_FORWARD} for name in ("llama", "qwen3", "gemma2", "gemma3", "olmo2", "stablelm")},
    "qwen2": {
        "self_attn.o_proj": ((2, 2, 8), ("self_attn.v_proj.weight", "self_attn.v_proj.bias")),
        **FEED_FORWARD,
    },
    "phi3": {
        "self_attn.o_proj": ((2, 2, 8), ("self_attn.qkv_proj.weight",)),
        "mlp.down_proj": ((1, 1, 48), ("mlp.gate_up_proj.weight",)),
    },
    "lfm2": {
        "self_attn.out_proj": ((2, 2, 8), ("self_attn.v_proj.weight",)),
        "feed_forward.w2": ((1, 1, 256), ("feed_forward.w1.weight", "feed_forward.w3.weight")),
    },
    "mixtral": {**ATTENTION, **EXPERTS},
    "qwen3_moe": {**ATTENTION, **SMALL_EXPERTS},
    # Half of the rows of its q_proj are a gate on the heads' outputs.
    "qwen3_next": {
        "self_attn.o_proj": ((2, 2, 8), ("self_attn.v_proj.weight", "self_attn.q_proj.weight")),
        "mlp.shared_expert.down_proj": (
            (1, 1, 16),
            ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        ),
        **SMALL_EXPERTS,
    },
    # Gate and up stand side by side, row by row.
    "gpt_oss": {
        "self_attn.o_proj": ((2, 2, 8), ("self_attn.v_proj.weight", "self_attn.v_proj.bias")),
        "mlp.experts.down_proj": ((1, 1, 48), ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias")),
    },
}


def layers_of(model: nn.Module) -> Layers:
    """Each layer, how it runs in float64, and its matrices in the order met."""
    decoder = find_decoder(model)
    as_is = record(model, decoder.layers, [IDS[:1]], place=lambda tensor: tensor)
    in_float64 = record(model, decoder.layers, [IDS[:1]], place=lambda t: t.double() if t.is_floating_point() else t)
    hidden = as_is.hidden[0]
    result: Layers = []
    for layer, (call,), (call64,) in zip(decoder.layers, as_is.calls, in_float64.calls):
        names = matrices_of(layer, "").names
        schedule, output = survey_layer(layer, lambda m, c=call, h=hidden: c(m, h), names)
        result.append((layer, lambda m, c=call64, h=hidden: c(m, h.double()), schedule.input_axes))
        hidden = output
    return result


def shuffled(shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)).argsort(1)


@pytest.mark.parametrize("name", EXPECTED)
def test_freedoms_of_a_family(name: str) -> None:
    model = tiny(name)
    with walkable(model):
        layer, call, axes = layers_of(model)[1]
        found = find_freedoms(layer, call, axes)
    summary = {
        freedom.consumer.parameter.removesuffix(".weight"): (
            tuple(freedom.consumer.positions.shape),
            tuple(site.parameter for site in freedom.producers),
        )
        for freedom in found
    }
    assert summary == EXPECTED[name]
    experts = [f for f in found if f.consumer.expert is not None]
    stacks = {f.consumer.parameter for f in experts}
    assert len(experts) == sum(len(layer.get_parameter(stack)) for stack in stacks)
    assert len(found) - len(experts) == len(EXPECTED[name]) - len(stacks)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "phi3", "falcon", "gpt_oss", "qwen3_next"])
def test_the_model_computes_the_same_after_every_permutation(name: str) -> None:
    model = tiny(name).double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with walkable(model):
        truth = model(IDS).logits
        for layer, call, axes in layers_of(model):
            for freedom in find_freedoms(layer, call, axes):
                apply(layer, freedom, shuffled(freedom.shape))
        assert torch.linalg.norm(model(IDS).logits - truth) <= 1e-9 * torch.linalg.norm(truth)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert len(moved) >= 2 * len(EXPECTED[name])
    assert all(
        torch.equal(p.flatten().sort().values, before[n].flatten().sort().values) for n, p in model.named_parameters()
    )


def test_looking_changes_nothing_and_a_layer_alike_is_only_proved() -> None:
    model = tiny("llama")
    layers, known = layers_of(model), Known()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    runs = []

    def counted(call: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
        return lambda m: (runs.append(1), call(m))[1]

    first = find_freedoms(layers[0][0], counted(layers[0][1]), layers[0][2], known)
    assert len(runs) > 3
    runs.clear()
    second = find_freedoms(layers[1][0], counted(layers[1][1]), layers[1][2], known)
    assert len(runs) == 3
    assert [f.consumer.parameter for f in first] == [f.consumer.parameter for f in second]
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in model.named_parameters())


class FeedForward(nn.Module):
    """A residual feed-forward layer with something between its two matrices."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.between, self.b = nn.Linear(8, 24), between, nn.Linear(24, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.b(self.between(self.a(hidden)))


class Summed(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.cumsum(-1)


class Stubborn(nn.Module):
    def __init__(self, kind: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype == torch.float64:
            raise self.kind("not implemented for 'Double'")
        return hidden


class Undifferentiable(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.requires_grad:
            raise RuntimeError("derivative not implemented")
        return hidden


class Float32Norm(nn.Module):
    """Casts to float32, as the norms of most models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(24))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden32 = hidden.float()
        return self.weight * (hidden32 / hidden32.to(torch.float32).square().mean(-1, keepdim=True).sqrt()).to(
            hidden.dtype
        )


AXES = {"a.weight": 1, "b.weight": 1}
HIDDEN = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def call(layer: nn.Module) -> Tensor:
    return layer(HIDDEN)


def test_the_gains_of_a_norm_between_move_too() -> None:
    norm = nn.LayerNorm(24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    (freedom,) = find_freedoms(FeedForward(norm), call, AXES)
    assert {site.parameter for site in freedom.producers} == {"a.weight", "a.bias", "between.weight", "between.bias"}


def test_a_cast_to_float32_does_not_blur_the_proof() -> None:
    (freedom,) = find_freedoms(FeedForward(Float32Norm()), call, AXES)
    assert {site.parameter for site in freedom.producers} == {"a.weight", "a.bias", "between.weight"}


def test_where_the_order_matters_there_is_no_freedom() -> None:
    assert find_freedoms(FeedForward(Summed()), call, AXES) == []
    assert len(find_freedoms(FeedForward(nn.SiLU()), call, AXES)) == 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, AssertionError, TypeError])
def test_a_layer_that_cannot_run_in_float64_has_none(kind: type[Exception]) -> None:
    assert find_freedoms(FeedForward(Stubborn(kind)), call, AXES) == []


def test_a_layer_that_cannot_be_differentiated_has_none() -> None:
    assert find_freedoms(FeedForward(Undifferentiable()), call, AXES) == []


MEMORY = "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."


@pytest.mark.parametrize(
    "error",
    [RuntimeError(MEMORY), torch.OutOfMemoryError("CUDA out of memory."), MemoryError("memory")],
    ids=["cpu", "gpu", "python"],
)
def test_a_lack_of_memory_is_not_a_lack_of_freedom(error: Exception) -> None:
    def starving(_layer: nn.Module) -> Tensor:
        raise error

    with pytest.raises(type(error), match="memory"):
        find_freedoms(FeedForward(nn.SiLU()), starving, AXES)


def test_a_mistake_in_the_search_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*_: object, **__: object) -> list[object]:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("llmprune.model.freedom._layouts", mistaken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_freedoms(FeedForward(nn.SiLU()), call, AXES)


def test_a_proof_fails_if_one_producer_is_forgotten_or_nothing_can_be_seen() -> None:
    layer = FeedForward(nn.SiLU())
    (freedom,) = find_freedoms(layer, call, AXES)
    assert prove(layer, call, [freedom])
    for missing in freedom.producers:
        others = tuple(site for site in freedom.producers if site is not missing)
        assert not prove(layer, call, [Freedom("neurons", freedom.consumer, others)])
    nn.init.zeros_(layer.b.weight)
    assert not prove(layer, call, [freedom])


def test_units_stay_in_their_block_and_copies_move_alike() -> None:
    layer = FeedForward(nn.Identity())
    with torch.no_grad():
        layer.b.weight.copy_(torch.arange(24.0).expand(8, 24))
    consumer = Site("b.weight", torch.arange(24).view(2, 3, 4), 1)
    apply(layer, Freedom("value", consumer, ()), torch.tensor([[1, 0, 2, 3], [3, 2, 1, 0]]))
    expected = [1, 0, 2, 3, 5, 4, 6, 7, 9, 8, 10, 11, 15, 14, 13, 12, 19, 18, 17, 16, 23, 22, 21, 20]
    assert layer.b.weight[0].tolist() == expected
