"""Perplexity of a causal language model on a text, with its standard error and the protocol it was measured by.

    python -m llmprune.eval.perplexity --model openai-community/gpt2 --dataset wikitext2

The protocol is that of the pruning papers (Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774): the text is
tokenised once and cut into windows that do not overlap, and perplexity is exp of the mean of the windows' mean
cross-entropies. Numbers compare only where window length, text and BOS agree, so the result names all three.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import click
import torch

from llmprune.data import BosMode, Corpus, Source, bos_token, evaluation_windows, load_corpus
from llmprune.errors import LlmpruneError, NumericError, UserError
from llmprune.eval.losses import LOGITS_MEMORY, window_losses
from llmprune.machine import device_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Perplexity", "default_seq_len", "evaluate", "main", "perplexity"]

_LONGEST_WINDOW = 2048  # the papers' window; models that reach further are still measured with it
# Reading stops at so many characters per token asked for: English text has 4 to 5, and no text known to us has 32.
_CHARACTERS_PER_TOKEN = 32


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

    def __str__(self) -> str:
        error = "n/a" if self.standard_error is None else f"{self.standard_error:.2g}"
        return f"{self.value:.4g} ± {error}"


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
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure `model` on `dataset`: anything that `load_corpus` reads, a `Corpus`, or windows of token ids (n, L).

    `tokens` bounds how much is read; without it all of the text is. `seq_len` is `default_seq_len` unless given (token
    ids bring their own). `bos` is as in `bos_token`, `text_column` as in `load_corpus`, where there is something to
    load, and the rest as in `perplexity`.

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
        enough = None if tokens is None else _CHARACTERS_PER_TOKEN * max(tokens, seq_len)
        corpus = load_corpus(
            dataset, purpose="evaluation", text_column=text_column, tokenizer=tokenizer, enough_characters=enough
        )
    windows = evaluation_windows(corpus, tokenizer, seq_len=seq_len, tokens=tokens, bos=first)
    value, standard_error, seconds = perplexity(
        model, windows, batch_size=batch_size, logits_memory=logits_memory, progress=progress
    )
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
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(f"perplexity needs windows of shape (1 or more, 2 or more); got {tuple(windows.shape)}.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more; got {batch_size}.")
    start = time.perf_counter()
    losses = window_losses(model, windows, batch_size=batch_size, logits_memory=logits_memory, progress=progress)
    seconds = time.perf_counter() - start
    value, standard_error = _exp_of_mean(losses)
    return value, standard_error, seconds


def _exp_of_mean(losses: list[float]) -> tuple[float, float | None]:
    mean = statistics.fmean(losses)
    try:
        value = math.exp(mean)
    except OverflowError:
        raise NumericError(f"the mean cross-entropy is {mean:.4g}, so the perplexity is beyond a float.") from None
    if len(losses) == 1:
        return value, None
    return value, value * statistics.stdev(losses) / math.sqrt(len(losses))


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
    """The command line of this file. Exit code 2 and one sentence where something given cannot be used."""
    command.main(args=None if argv is None else list(argv), prog_name="python -m llmprune.eval.perplexity")


@click.command(help="Perplexity of a causal language model, with its standard error and the protocol.")
@click.option("--model", "model_id", required=True, help="Hub id, folder or GGUF file.")
@click.option("--revision", help="Branch, tag or commit of the model.")
@click.option("--dataset", default="wikitext2", show_default=True, help="c4, wikitext2, demo, Hub id or file.")
@click.option("--text-column", help="Column with the text. [default: text, else messages]")
@click.option("--tokens", type=int, help="Read at most so many tokens. [default: all]")
@click.option("--seq-len", type=int, help="Tokens per window. [default: 2048, or what the model takes]")
@click.option("--bos", type=click.Choice(get_args(BosMode)), default="auto", show_default=True, help="BOS per window.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", help="Such as cpu or cuda:1. [default: the GPU if there is one]")
@click.option("--batch-size", type=int, help="Windows per forward. [default: by memory for logits]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    *,
    model_id: str,
    revision: str | None,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    from llmprune.model import load

    try:
        loaded = load(model_id, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        model = loaded.model.to(device_named(device))
        result = evaluate(model, loaded.tokenizer, progress=_progress(), **settings)
    except LlmpruneError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    click.echo(json.dumps(asdict(result), indent=2) if as_json else _as_lines(result))


def _as_lines(result: Perplexity) -> str:
    return "\n".join(
        [
            f"perplexity  {result}",
            f"tokens      {result.tokens:,} predicted in {result.windows:,} windows, {result.seconds:.1f} s",
            f"protocol    {result.protocol}",
        ]
    )


def _progress() -> Callable[[int, int], None] | None:
    """A counter on one line of a terminal; nothing where standard error is a file."""
    if not sys.stderr.isatty():
        return None
    return lambda done, total: click.echo(f"\rwindow {done} of {total}", err=True, nl=done == total)


if __name__ == "__main__":
    main()
