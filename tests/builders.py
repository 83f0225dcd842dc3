"""Tiny models with random weights and a tokenizer to go with them: made in a moment, without a download."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FAMILIES", "tiny_model", "tiny_tokenizer"]

_COMMON = {
    "vocab_size": 64,
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

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `FAMILIES` in evaluation mode, with the same random weights every time."""
    torch.manual_seed(0)
    # Not `.to(dtype)`: that would round the rotary frequencies too, which from_pretrained keeps in float32.
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
    return model.train(False)


def tiny_tokenizer(*, adds_bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models' 64 tokens: one token a character, so that every count is known beforehand.

    0 to 3 are pad, bos, eos and unk; then come a to z, digits, blank, newline and some punctuation. `adds_bos` puts a
    BOS before every text, as Llama's does. Texts longer than 64 tokens are "too long" for it.
    """
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [*specials, *"abcdefghijklmnopqrstuvwxyz0123456789 \n.,;:!?'-=()\"/@<>|[]_"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    assert len(vocabulary) <= _COMMON["vocab_size"]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=False))
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        chat_template=chat_template,
    )
