"""One question to a model before it is saved, which the reloaded one must answer alike, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import NumericError

__all__ = ["Probe", "logits_of", "take_probe"]


@dataclass(frozen=True)
class Probe:
    """What the model in memory answers to a fixed input, and how it computed that: the reloaded one must agree."""

    input_ids: Tensor
    """(1, 16), int64, on the CPU."""
    logits: Tensor
    """(1, 16, vocab), float32, on the CPU."""
    device: torch.device
    """Where the input goes."""
    loading: dict[str, Any]
    """Arguments of `from_pretrained` for the same dtype, placement and kernels; others round differently."""


def take_probe(model: PreTrainedModel) -> Probe:
    """Run 16 fixed pseudo-random tokens through `model`.

    Raises
    ------
    NumericError
        if the logits hold NaN.
    """
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)
    )
    logits = logits_of(model, ids)
    if bool(logits.isnan().any()):
        raise NumericError("The model answers NaN to a plain input of 16 tokens, so it is not worth saving.")
    return Probe(ids, logits, _input_device(model), _loading(model))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(1, tokens) int64 → (1, tokens, vocab) float32 on the CPU, in evaluation mode."""
    training = model.training
    model.train(False)
    try:
        output = model(input_ids=ids.to(_input_device(model)), use_cache=False)
    finally:
        model.train(training)
    logits: Tensor = output.logits.float().cpu()
    return logits


def _input_device(model: PreTrainedModel) -> torch.device:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    weight = next(embedding.parameters())
    return torch.device("cpu") if weight.device.type == "meta" else weight.device  # accelerate moves it on


def _loading(model: PreTrainedModel) -> dict[str, Any]:
    loading: dict[str, Any] = {"dtype": model.dtype}
    for name in ("attn_implementation", "experts_implementation"):
        if isinstance(kernel := getattr(model.config, f"_{name}", None), str):
            loading[name] = kernel
    placement = getattr(model, "hf_device_map", None) or {}
    if len(set(placement.values())) > 1:
        loading["device_map"] = dict(placement)
    return loading
