"""Perplexity of a causal language model on a text, with its standard error and the protocol it was measured by.

    python -m llmprune.eval.perplexity --model openai-community/gpt2 --dataset wikitext2

The protocol is that of the pruning papers (Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774): the text is
tokenised once and cut into windows that do not overlap, and perplexity is exp of the mean of the windows' mean
cross-entropies. Numbers compare only where window length, text and BOS agree, so the result names all three.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmprune.data import BosMode, Corpus, Source, bos_token, evaluation_windows, load_corpus
from llmprune.errors import NumericError, UserError
from llmprune.eval.divergence import DensePass, Divergence, mean_with_error
from llmprune.eval.losses import LOGITS_MEMORY, window_losses
from llmprune.eval.versions import versions
from llmprune.results import with_error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CHARACTERS_PER_TOKEN", "CPU_TOKENS", "Perplexity", "default_seq_len", "evaluate", "main", "perplexity"]

CPU_TOKENS = 16_384
"""Tokens of each text that are measured on a CPU where nobody said how many: minutes, not hours."""

_LONGEST_WINDOW = 2048  # the papers' window; models that reach further are still measured with it

CHARACTERS_PER_TOKEN = 32
"""Reading stops at so many per token asked for: English text has 4 to 5, and no text known to us has 32."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and all that is needed to compare it with another one."""

    dataset: str
    value: float
    standard_error: float | None
    """Of `value`, windows taken as independent; None for a single window."""
    windows: int
    tokens: int
    """Predicted tokens: windows · (seq_len − 1)."""
    seq_len: int
    bos: bool
    """Whether each window begins with the BOS token."""
    dtype: str
    seconds: float
    protocol: str
    """How it was measured, in one sentence."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the text came from: see `llmprune.data.Corpus`."""
    divergence: Divergence | None = None
    """From the dense model on the same tokens, where there is one to compare with."""
    versions: dict[str, str] = field(default_factory=dict)
    kind: str = "perplexity"

    def __str__(self) -> str:
        return with_error(self.value, self.standard_error)


def default_seq_len(config: PreTrainedConfig) -> int:
    """The papers' window of 2048 tokens, or all that the model can take if that is less."""
    return min(_LONGEST_WINDOW, _longest_input(config) or _LONGEST_WINDOW)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source | Corpus,
    *,
    tokens: int | None = None,
    seq_len: int | None = None,
    bos: BosMode = "auto",
    text_column: str | None = None,
    batch_size: int | None = None,
    logits_memory: int = LOGITS_MEMORY,
    record: DensePass | None = None,
    against: DensePass | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure `model` on `dataset`: anything that `load_corpus` reads, a `Corpus`, or windows of token ids (n, L).

    `tokens` bounds how much is read; without it all of the text is. `seq_len` is `default_seq_len` unless given (token
    ids bring their own). `bos` is as in `bos_token`, `text_column` as in `load_corpus`, where there is something to
    load. Into `record` goes what will be needed to compare another model with this one; `against` is such a record of
    the dense model, and the result then holds the divergence from it. The rest is as in `perplexity`.

    Raises
    ------
    UserError
        if the text cannot be had, is too short, or the windows are longer than the model takes.
    NumericError
        if a window's loss is not finite.
    """
    if seq_len is None:
        seq_len = dataset.shape[-1] if isinstance(dataset, torch.Tensor) else default_seq_len(model.config)
    _check_length(seq_len, model.config)
    first = bos_token(bos, tokenizer, model.config.model_type)
    if isinstance(dataset, Corpus | torch.Tensor):
        corpus: Corpus | torch.Tensor = dataset
    else:
        enough = None if tokens is None else CHARACTERS_PER_TOKEN * max(tokens, seq_len)
        corpus = load_corpus(
            dataset, purpose="evaluation", text_column=text_column, tokenizer=tokenizer, enough_characters=enough
        )
    windows = evaluation_windows(corpus, tokenizer, seq_len=seq_len, tokens=tokens, bos=first)
    _check_windows(windows, batch_size)
    options: dict[str, Any] = {"batch_size": batch_size, "logits_memory": logits_memory, "progress": progress}
    start, divergence = time.perf_counter(), None
    if against is not None and against.trouble is None:
        losses, divergence = against.compare(model, windows, **options)
    else:
        measure = window_losses if record is None else record.record
        losses = measure(model, windows, **options)
    seconds = time.perf_counter() - start
    value, standard_error = _exp_of_mean(losses)
    dtype = str(model.dtype).removeprefix("torch.")
    name, provenance = _described(corpus)
    return Perplexity(
        dataset=name,
        value=value,
        standard_error=standard_error,
        windows=len(windows),
        tokens=len(windows) * (seq_len - 1),
        seq_len=seq_len,
        bos=first is not None,
        dtype=dtype,
        seconds=seconds,
        protocol=_protocol(corpus, windows, bos=first, dtype=dtype),
        provenance=provenance,
        divergence=divergence,
        versions=versions(),
    )


def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    batch_size: int | None = None,
    logits_memory: int = LOGITS_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float | None, float]:
    """(perplexity, its standard error, seconds) of `model` on windows (n, L) of token ids.

    The value is exp of the mean over windows of the mean cross-entropy of L − 1 predictions. Its error is the standard
    error of that mean, carried through exp (delta method): value · std(window means) / √n; None for one window.

    `batch_size`, `logits_memory` and `progress` as in `window_losses`.

    Raises
    ------
    NumericError
        if a window's loss is NaN or infinite, or the perplexity is too large for a float.
    """
    _check_windows(windows, batch_size)
    start = time.perf_counter()
    losses = window_losses(model, windows, batch_size=batch_size, logits_memory=logits_memory, progress=progress)
    seconds = time.perf_counter() - start
    value, standard_error = _exp_of_mean(losses)
    return value, standard_error, seconds


def _exp_of_mean(losses: list[float]) -> tuple[float, float | None]:
    mean, error = mean_with_error(losses)
    try:
        value = math.exp(mean)
    except OverflowError:
        raise NumericError(f"the mean cross-entropy is {mean:.4g}, so the perplexity is beyond a float.") from None
    return value, None if error is None else value * error


def _check_windows(windows: torch.Tensor, batch_size: int | None) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(f"perplexity needs windows of shape (1 or more, 2 or more); got {tuple(windows.shape)}.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more; got {batch_size}.")


def _longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that the model can take, or None where its config names no limit (ALiBi, recurrent models)."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _check_length(seq_len: int, config: PreTrainedConfig) -> None:
    longest = _longest_input(config)
    if longest is not None and seq_len > longest:
        raise UserError(f"--seq-len may be at most {longest} for this model; got {seq_len}.")


def _described(corpus: Corpus | torch.Tensor) -> tuple[str, dict[str, Any]]:
    """A name for people and the provenance of what was evaluated."""
    if isinstance(corpus, Corpus):
        return corpus.name, corpus.provenance
    ids = corpus.to("cpu", torch.int64).contiguous()
    return "token ids", {"rows": len(ids), "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}


def _protocol(corpus: Corpus | torch.Tensor, windows: torch.Tensor, *, bos: int | None, dtype: str) -> str:
    count, seq_len = windows.shape
    if isinstance(corpus, torch.Tensor):
        text = "token ids as given"
    else:
        text = f"{corpus.name}: texts joined by two newlines, tokenised once"
    start = "no BOS but what the tokenizer puts first" if bos is None else "BOS first in every window"
    return (
        f"{text}; {count} windows of {seq_len} tokens without overlap, the last partial one dropped; {start}; "
        f"{dtype} model, float32 cross-entropy."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this file, which is `llmprune eval`: exit code 2 and one sentence for what cannot be used."""
    from llmprune.eval.command import command, run_command

    run_command(command, argv, "python -m llmprune.eval.perplexity")


if __name__ == "__main__":
    main()
