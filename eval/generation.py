"""What a dense and a pruned model write after the same prompts: a look beside the numbers, and no number itself.

Greedy, so that it is the same every time: the likeliest token at every step. One step at which the order of the first
two tokens changes sends the texts apart for good, so `same_tokens` says how far they went together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.eval.losses import evaluating, input_device
from llmprune.model import max_seq_len

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NEW_TOKENS", "PROMPTS", "Continuation", "Generation", "continuations", "side_by_side"]

PROMPTS = ("The capital of France is", "Once upon a time, there was a little")
"""A fact and a story, in the words that language models know best."""

NEW_TOKENS = 32


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt, as token ids and as text."""

    prompt: str
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Generation:
    """What two models wrote after the same prompt."""

    prompt: str
    dense: str
    pruned: str
    """The continuations, without the prompt."""
    tokens: int
    """New tokens at most."""
    same_tokens: int
    """How many of the first ones are the same."""
    protocol: str


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
) -> tuple[Continuation, ...]:
    """What the model writes after each prompt, greedily, up to the end of its text or `new_tokens`.

    Where the model takes fewer tokens than prompt and text have, half of them are for the prompt and half for the text.
    A model without `generate` writes nothing: the result is empty.
    """
    if not model.can_generate():
        return ()
    limit = max_seq_len(model)
    if limit is not None:
        new_tokens = min(new_tokens, limit // 2)
    written = []
    with evaluating(model), torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=input_device(model))
            if limit is not None and ids.shape[1] + new_tokens > limit:
                ids = ids[:, : limit - new_tokens]
                prompt = str(tokenizer.decode(ids[0], skip_special_tokens=True))
            tokens = _greedy(model, ids, new_tokens)
            text = str(tokenizer.decode(tokens, skip_special_tokens=True))
            written.append(Continuation(prompt, tuple(tokens), text))
    return tuple(written)


def side_by_side(dense: Sequence[Continuation], pruned: Sequence[Continuation]) -> tuple[Generation, ...]:
    """Two models' continuations of the same prompts, prompt by prompt."""
    return tuple(
        Generation(
            prompt=one.prompt,
            dense=one.text,
            pruned=other.text,
            tokens=NEW_TOKENS,
            same_tokens=_in_common(one.tokens, other.tokens),
            protocol=f"greedy, at most {NEW_TOKENS} new tokens, the prompt as it is, without a chat template",
        )
        for one, other in zip(dense, pruned, strict=True)
    )


def _greedy(model: Any, ids: torch.Tensor, new_tokens: int) -> list[int]:
    """The likeliest token at every step; what the model's own settings say of sampling and penalties is left out."""
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    settings |= {"temperature": None, "top_k": None, "top_p": None, "no_repeat_ngram_size": 0}
    settings |= {"num_return_sequences": 1, "return_dict_in_generate": False, "stop_strings": None}
    settings |= {"token_healing": False, "max_time": None}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = 0  # there is one text, so nothing is ever padded
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings)
    tokens: list[int] = written[0, ids.shape[1] :].tolist()
    return tokens


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
