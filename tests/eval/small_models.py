"""Models whose predictions can be told apart, a pruned twin of each, and windows to measure them on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.builders import tiny_model

__all__ = ["MODELS", "VOCABULARY", "pruned", "random_windows", "spread_out", "tiny_gemma2"]

VOCABULARY = 64


def spread_out(model: Any) -> Any:
    """Random weights predict all tokens alike, which hides mistakes: make the head's logits differ by several nats."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def tiny_gemma2() -> Any:
    """Gemma-2 caps its final logits after the head: cap · tanh(logits / cap)."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=3.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Gemma2ForCausalLM(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: spread_out(tiny_model("gpt2")),
    "llama": lambda: spread_out(tiny_model("llama")),
    "gemma2": lambda: spread_out(tiny_gemma2()),
}


def pruned(model: Any) -> Any:
    """A copy with a third of the weights of its decoder layers at zero and the others larger, so that it tells."""
    twin = copy.deepcopy(model)
    keep = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim == 2 and (".layers." in name or ".h." in name):
                parameter.mul_(8 * (torch.rand(parameter.shape, generator=keep) > 0.33))
    return twin


def random_windows(count: int = 5, length: int = 24) -> torch.Tensor:
    """(count, length) token ids, the same every time."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
