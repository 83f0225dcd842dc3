"""On a trained model the methods rank as published, however green all else is. (The main job is in test_readme.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune


@pytest.fixture(scope="module")
def stories(shared: Path) -> LlamaForCausalLM:
    """karpathy's stories260K: a trained Llama of five layers, read from llama2.c's format."""
    raw = (shared / "models/stories260K/stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _ = torch.frombuffer(bytearray(raw[:28]), dtype=torch.int32).tolist()
    values = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    taken = 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        count = torch.Size(shape).numel()
        taken += count
        return values[taken - count : taken].view(shape).clone()

    kv = dim // heads * kv_heads
    embedding, norm1 = take(vocab, dim), take(layers, dim)
    q, k, v, o = take(layers, dim, dim), take(layers, kv, dim), take(layers, kv, dim), take(layers, dim, dim)
    norm2, gate, down, up = (
        take(layers, dim),
        take(layers, hidden, dim),
        take(layers, dim, hidden),
        take(layers, hidden, dim),
    )
    state: dict[str, Tensor] = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    for i in range(layers):
        here = f"model.layers.{i}."
        state[f"{here}input_layernorm.weight"], state[f"{here}post_attention_layernorm.weight"] = norm1[i], norm2[i]
        state[f"{here}self_attn.q_proj.weight"] = _halves(q[i], heads)
        state[f"{here}self_attn.k_proj.weight"] = _halves(k[i], kv_heads)
        state[f"{here}self_attn.v_proj.weight"], state[f"{here}self_attn.o_proj.weight"] = v[i], o[i]
        for name, matrix in (("gate", gate), ("down", down), ("up", up)):
            state[f"{here}mlp.{name}_proj.weight"] = matrix[i]
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state, strict=False)
    return model


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs lie side by side in llama2.c, and in two halves of a head in transformers."""
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape)


def written_by(model: Any, seed: int, windows: int, length: int = 128) -> Tensor:
    """Stories that the model tells itself: the only text that it knows."""
    torch.manual_seed(seed)
    start = torch.full((windows, 1), 1)
    return model.generate(start, do_sample=True, max_length=length, min_length=length, pad_token_id=0, use_cache=True)


def loss(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@pytest.mark.real
@pytest.mark.parametrize(("sparsity", "at_most"), [("2:4", 0.8), ("50%", 0.95)])
def test_on_a_trained_model_the_methods_rank_as_published(stories: Any, sparsity: str, at_most: float) -> None:
    """Dense < SparseGPT < Wanda < magnitude in loss, and SparseGPT's part of Wanda's loss is clearly below one."""
    calibration, unseen = written_by(stories, 0, 64), written_by(stories, 1, 64)
    state = {name: tensor.clone() for name, tensor in stories.state_dict().items()}
    losses = {"dense": loss(stories, unseen)}
    for method in ("sparsegpt", "wanda", "magnitude"):
        stories.load_state_dict(state)
        llmprune.prune(stories, sparsity=sparsity, method=method, dataset=calibration)
        losses[method] = loss(stories, unseen)
    stories.load_state_dict(state)
    assert list(losses) == sorted(losses, key=lambda name: losses[name]), losses
    assert losses["sparsegpt"] - losses["dense"] < at_most * (losses["wanda"] - losses["dense"]), losses
