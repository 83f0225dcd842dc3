"""Every family of models that llmprune promises, in one test: tiny random ones built from configuration objects.

Nothing in llmprune knows a family by name, so this is the proof that finding by structure reaches all of their linears,
touches nothing else, and saves what plain transformers loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import UnsupportedModel

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITHOUT_GQA = {**SMALL, "num_key_value_heads": 4}
FEW = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "intermediate_size")}
EXPERTS = {"head_dim": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """config : makes the configuration; dense : parts of the names of matrices in the layers that stay dense;
    per_layer : weights pruned in the second decoder layer, experts counted one by one"""

    config: Callable[[], Any]
    per_layer: int
    dense: tuple[str, ...] = field(default=())


T = transformers
FAMILIES: dict[str, Family] = {
    "gpt2": Family(lambda: T.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4), 4),
    "opt": Family(lambda: T.OPTConfig(**FEW, ffn_dim=48, word_embed_proj_dim=32), 6),
    "gpt_neox": Family(lambda: T.GPTNeoXConfig(**FEW, intermediate_size=48), 4),
    "bloom": Family(lambda: T.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), 4),
    "falcon": Family(lambda: T.FalconConfig(**FEW), 4),
    "llama": Family(lambda: T.LlamaConfig(**SMALL), 7),
    "mistral": Family(lambda: T.MistralConfig(**SMALL, sliding_window=8), 7),
    "qwen2": Family(lambda: T.Qwen2Config(**SMALL), 7),
    "qwen3": Family(lambda: T.Qwen3Config(**SMALL, head_dim=8), 7),
    "gemma2": Family(lambda: T.Gemma2Config(**SMALL, head_dim=8, sliding_window=8), 7),
    "gemma3": Family(lambda: T.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8), 7),
    "phi3": Family(lambda: T.Phi3Config(**SMALL), 4),
    "olmo2": Family(lambda: T.Olmo2Config(**SMALL), 7),
    "stablelm": Family(lambda: T.StableLmConfig(**SMALL), 7),
    "smollm3": Family(lambda: T.SmolLM3Config(**SMALL), 7),
    "granite": Family(lambda: T.GraniteConfig(**SMALL), 7),
    "lfm2": Family(lambda: T.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), 7, ("conv.conv",)),
    "qwen3_next": Family(
        lambda: T.Qwen3NextConfig(
            **SMALL,
            **EXPERTS,
            num_experts=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        ),
        4 + 8 + 3,
        ("mlp.gate.", "shared_expert_gate", "conv1d"),
    ),
    "mixtral": Family(lambda: T.MixtralConfig(**SMALL, num_local_experts=4), 4 + 8, ("mlp.gate.",)),
    "qwen3_moe": Family(
        lambda: T.Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, moe_intermediate_size=16), 4 + 8, ("mlp.gate.",)
    ),
    "gpt_oss": Family(
        lambda: T.GptOssConfig(**SMALL, **EXPERTS, num_local_experts=4, sliding_window=8), 4 + 8, ("router", "_bias")
    ),
}

IDS = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[name].config()).eval()


def stored(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], tiny(name)
    before, tie = stored(model), model.get_output_embeddings().weight is model.get_input_embeddings().weight
    result = llmprune.prune(model, sparsity="2:4", dataset=IDS, output_dir=tmp_path / name)
    pruned, adjusted = {row.parameter for row in result.report.pruned}, adjusted_by(result)

    assert sum(row.layer == 1 for row in result.report.pruned) == family.per_layer
    for key, weight in model.named_parameters():
        if key in pruned:
            axis = next(row.input_axis for row in result.report.pruned if row.parameter == key)
            matrix = weight if axis == 1 else weight.mT
            assert ((matrix == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all(), key
        else:
            assert key in adjusted or torch.equal(weight, before[key]), key
            in_layers = any(part in key for part in (".layers.", ".h.")) and weight.ndim > 1
            assert not in_layers or any(part in key for part in family.dense), f"{key} was not reached"
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie
    assert_loads(tmp_path / name, model)


def adjusted_by(result: llmprune.PruneResult) -> set[str]:
    """Parameters that a step changed without pruning them: biases of pruned linears, and nothing else."""
    names = {name for name, held in result.report.tensors.items() if held.adjusted}
    pruned = {row.parameter for row in result.report.pruned}
    # gpt-oss has its experts' biases beside their weights, under names without a dot.
    assert names <= {name.removesuffix("weight") + "bias" for name in pruned} | {f"{name}_bias" for name in pruned}
    return names


def assert_loads(directory: Path, model: Any) -> None:
    """Plain transformers reads the saved directory, and the loaded model computes the same."""
    again = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    for (name, saved), (_, kept) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(saved, kept), name
    with torch.no_grad():
        assert torch.equal(again(IDS[:2]).logits, model(IDS[:2]).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_16_bit_models_keep_their_zeros_and_everything_else(name: str) -> None:
    model = tiny(name).to(torch.bfloat16)
    before = stored(model)
    result = llmprune.prune(model, sparsity="1:4", dataset=IDS)
    changed = {row.parameter for row in result.report.pruned} | adjusted_by(result)
    for key, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert key in changed or torch.equal(weight, before[key])
    for row in result.report.pruned:
        assert row.zeros >= 3 * row.shape[0] * row.shape[1] // 4


def test_only_the_language_decoder_of_a_multimodal_model_is_pruned() -> None:
    text = {**SMALL, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = T.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = T.Gemma3ForConditionalGeneration(config).eval()
    before = stored(model)
    report = llmprune.prune(model, sparsity="2:4", dataset=IDS).report
    assert {row.parameter for row in report.pruned} == {
        key for key, weight in before.items() if "language_model.layers" in key and weight.ndim == 2
    }
    for key, weight in model.named_parameters():
        assert torch.equal(weight, before[key]) != ("language_model.layers" in key and weight.ndim == 2), key
    assert any("vision_tower" in row.name for row in report.skipped)


def test_a_weight_that_stands_in_several_layers_is_refused_untouched() -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = stored(model)
    with pytest.raises(UnsupportedModel, match="shared with decoder layer 0"):
        llmprune.prune(model, dataset=IDS)
    assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())


def test_a_model_whose_weights_are_copied_before_use_is_refused_with_the_list() -> None:
    model = tiny("llama")
    up = model.model.layers[1].mlp.up_proj
    up.forward = lambda x: torch.nn.functional.linear(x, up.weight.clone())
    with pytest.raises(UnsupportedModel, match=r"layers\.1.*mlp\.up_proj\.weight \(48, 32\)"):
        llmprune.prune(model, dataset=IDS)
    report = llmprune.prune(model, dataset=IDS, ignore=["up_proj"]).report
    assert sum(row.reason == "--ignore" for row in report.skipped) == 2


def test_a_model_that_mixes_between_layers_is_refused() -> None:
    model = tiny("llama")
    first, second = model.model.layers
    own = second.forward
    second.forward = lambda hidden, **kwargs: own(hidden, **kwargs)
    handle = first.register_forward_hook(lambda _m, _a, out: out * 2)
    try:
        with pytest.raises(UnsupportedModel, match="between decoder layers 0 and 1"):
            llmprune.prune(model, dataset=IDS)
    finally:
        handle.remove()
