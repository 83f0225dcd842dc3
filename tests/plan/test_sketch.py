"""A model without weights is surveyed as the loaded one is, layers of several kinds included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from llmprune.config import PruneConfig
from llmprune.errors import UnsupportedModel
from llmprune.pipeline import survey_model
from llmprune.plan.sketch import TOKENS, hollow_model, sketch
from tests.builders import FAMILIES

CPU = torch.device("cpu")


def mixed_layers() -> Any:
    """Convolutions and attention in turn."""
    return transformers.Lfm2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.mark.parametrize("make", [mixed_layers, FAMILIES["qwen3_moe"], FAMILIES["gpt2"]])
def test_the_survey_is_that_of_the_loaded_model(make: Any) -> None:
    settings = PruneConfig(ignore=("re:.*layers.0.*o_proj",) if make is FAMILIES["qwen3_moe"] else ())
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make()).eval()
    truth = survey_model(model, torch.zeros(1, TOKENS, dtype=torch.int64), settings, device=CPU)
    hollow = hollow_model(make(), torch.float32)
    drawn = sketch(hollow, settings, device=CPU)
    for planned, seen in zip(drawn.survey.schedules, truth.schedules, strict=True):
        # What waits is looked at where a weight is met, and an ignored one is met in the drawing alone.
        assert replace(planned, waiting_bytes=0) == replace(seen, waiting_bytes=0)
        assert planned.waiting_bytes >= seen.waiting_bytes
    assert drawn.survey.skipped == truth.skipped
    assert {parameter.device.type for parameter in hollow.parameters()} == {"meta"}
    assert not any("forward" in vars(module) for module in hollow.modules())


def test_layers_that_are_alike_are_run_once() -> None:
    drawn = sketch(hollow_model(mixed_layers(), torch.float32), PruneConfig(), device=CPU)
    assert [kind is drawn.kinds[0] for kind in drawn.kinds] == [True, False, True, False]


def test_a_weight_in_two_layers_is_refused() -> None:
    model = hollow_model(FAMILIES["llama"](), torch.float32)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj\.weight is shared with decoder layer 0"):
        sketch(model, PruneConfig(), device=CPU)
