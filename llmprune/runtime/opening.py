"""A model to run, packed or dense, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.errors import LlmpruneError, UserError
from llmprune.machine import device_named
from llmprune.model import DTYPES, quiet_transformers
from llmprune.runtime.placement import sparse_linears
from llmprune.runtime.weight import UNPACKED

__all__ = ["Opened", "Wanted", "form_of", "nothing_packed", "open_model", "token_ids"]


@dataclass(frozen=True)
class Wanted:
    """Which model, and how.

    name : hub id or directory, packed or dense
    dtype : one of `llmprune.model.DTYPES`; "auto" is as stored
    device : as in `llmprune.machine.device_named`; None takes the GPU if there is one
    """

    name: str
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode on its device.

    tokenizer : None if the checkpoint has none
    packed : how many of its linears are packed
    unpacked : how many weights are packed in the checkpoint and dense in memory, as fused experts are
    """

    model: Any
    tokenizer: Any
    device: torch.device
    packed: int
    unpacked: int


def open_model(wanted: Wanted) -> Opened:
    """Load a model as it is: packed linears stay packed.

    Raises
    ------
    UserError
        if it cannot be loaded.
    """
    if wanted.dtype not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}; got {wanted.dtype!r}.")
    device = device_named(wanted.device)
    options = {"trust_remote_code": wanted.trust_remote_code}
    with _one_sentence(wanted.name), quiet_transformers():
        # device_map puts each tensor on its device as it is read, so a GPU's model never stands in main memory whole.
        model = AutoModelForCausalLM.from_pretrained(
            wanted.name, dtype=wanted.dtype, device_map={"": device}, **options
        ).eval()
    return Opened(
        model, _tokenizer(wanted.name, options), device, len(sparse_linears(model)), getattr(model, UNPACKED, 0)
    )


def _tokenizer(name: str, options: dict[str, Any]) -> Any:
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(name, **options)
    except Exception:  # transformers and tokenizers raise all sorts for files that are damaged or not theirs
        return None


def form_of(packed: int, unpacked: int) -> str:
    """`Opened.packed` and `Opened.unpacked` in words."""
    told = f"{packed} packed linears" if packed else "a dense model"
    return f"{told} ({unpacked} packed weights became dense while loading)" if unpacked else told


def nothing_packed(opened: Opened, name: str) -> UserError:
    """The error for a model without a linear that is or could be packed."""
    if opened.unpacked:
        return UserError(
            f"{name} has no packed linear: its {opened.unpacked} packed weights are parts of fused parameters, such as "
            "experts, which run dense. Generate from it as from a dense model."
        )
    return UserError(
        f"{name} has no packed linear, and none that is smaller packed: prune it first (llmprune --model …)."
    )


def token_ids(opened: Opened, prompt: str) -> torch.Tensor:
    """The prompt's token ids, (1, tokens), on the model's device.

    Raises
    ------
    UserError
        if there is no tokenizer, or the prompt is empty.
    """
    if opened.tokenizer is None:
        raise UserError("--prompt needs a tokenizer, and the model's directory has none: copy its files there.")
    ids: torch.Tensor = opened.tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise UserError("--prompt is empty: give some text to go on from.")
    return ids.to(opened.device)


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except LlmpruneError:
        raise
    except Exception as error:  # transformers and safetensors raise all sorts for files that are not theirs
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        cure = "Give a directory or hub id that transformers' AutoModelForCausalLM loads, packed by llmprune or dense."
        if "trust_remote_code" in str(error):
            cure = "It brings its own Python code: read it, then add --trust-remote-code to run it."
        raise UserError(f"{name} cannot be loaded: {first.rstrip('.')}. {cure}") from error
