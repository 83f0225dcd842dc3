"""Texts to windows of token ids.

Calibration wants many different pages, so documents are shuffled by a seed and packed end to end. Evaluation wants the
papers' text in the papers' order, so that its number can be compared with theirs (Frantar & Alistarh, 2023,
https://arxiv.org/abs/2301.00774, and Sun et al., 2023, https://arxiv.org/abs/2306.11695).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch

from llmprune.data.corpus import Corpus
from llmprune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BosMode", "bos_token", "calibration_windows", "evaluation_windows"]

BosMode = Literal["auto", "always", "never"]

# Gemma was trained with BOS before every sequence and leans on it: without, its perplexity is in the hundreds or
# worse, whatever was pruned. Other families lose little, and the papers' numbers are without.
_NEEDS_BOS = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "recurrent_gemma",
        "vaultgemma",
    }
)

_DOCUMENTS_AT_ONCE = 64
_SEPARATOR = "\n\n"


def bos_token(mode: BosMode, tokenizer: PreTrainedTokenizerBase, model_type: str) -> int | None:
    """The token to put at the start of every window, or None.

    "auto" asks for one only where a model is meaningless without (`model_type` as in its config).

    Raises
    ------
    UserError
        if the mode is unknown, or asks for a BOS token that the tokenizer does not have.
    """
    if mode not in get_args(BosMode):
        raise UserError(f"--bos is one of {', '.join(get_args(BosMode))}; got {mode!r}.")
    if mode == "never" or (mode == "auto" and model_type not in _NEEDS_BOS):
        return None
    token = tokenizer.bos_token_id
    if not isinstance(token, int):
        why = f"{model_type} models need one" if mode == "auto" else "--bos always asks for one"
        raise UserError(f"the tokenizer has no BOS token, and {why}; use --bos never, or a tokenizer that has one.")
    return token


def calibration_windows(
    corpus: Corpus | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: int | None,
) -> torch.Tensor:
    """(num_samples, seq_len) int64 windows of shuffled documents, the same for the same seed.

    The stream of tokens is that of each document followed by two newlines, tokenised one by one without special
    tokens, in an order drawn from `seed`; it ends with the document that makes it long enough. Blank documents are
    left out. The windows do not overlap, and what the stream has more than they need is left as gaps of random
    length before them: within one long document, other seeds find other windows too. With `bos` each window is that
    token and seq_len − 1 tokens of text.

    A tensor (n, seq_len) of token ids, n ≥ num_samples, is taken as it is: its first num_samples rows.

    Raises
    ------
    UserError
        if there is too little text, or the tensor does not fit.
    """
    _check_positive(num_samples=num_samples)
    _check_positive(seq_len=seq_len, least=2)
    if isinstance(corpus, torch.Tensor):
        return _given_windows(corpus, seq_len, bos, least=num_samples)[:num_samples]
    length = seq_len - (bos is not None)
    needed = num_samples * length
    rng = random.Random(seed)
    stream = _packed(corpus.texts, tokenizer, rng, needed=needed, bos=bos)
    if len(stream) < needed:
        raise UserError(
            f"{corpus.name} holds {len(stream):,} tokens, and {num_samples} calibration windows of {seq_len} need "
            f"{needed:,}: {needed - len(stream):,} are missing. Lower --num-samples or --seq-len, or give more text."
        )
    spare = len(stream) - needed
    gaps = sorted(rng.randint(0, spare) for _ in range(num_samples))
    starts = [gap + index * length for index, gap in enumerate(gaps)]
    return _with_bos(torch.stack([stream[start : start + length] for start in starts]), bos)


def evaluation_windows(
    corpus: Corpus | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    tokens: int | None,
    bos: int | None,
) -> torch.Tensor:
    """(windows, seq_len) int64 consecutive windows of the whole text, as in the papers.

    The texts are joined by two newlines and tokenised once with the tokenizer's own habits, so a BOS stands at most at
    the very start. Windows do not overlap and a last partial one is dropped. With `bos` the text is tokenised without
    special tokens and each window is that token and seq_len − 1 tokens of text. At most `tokens` tokens are used, but
    at least one window. All of the text is tokenised even so: no cut is certain to leave every tokenizer's tokens
    before it unchanged. Load less text to save the time.

    A tensor (n, seq_len) of token ids is taken as it is.

    Raises
    ------
    UserError
        if the text is too short for one window, or the tensor does not fit.
    """
    _check_positive(seq_len=seq_len, least=2)
    if tokens is not None:
        _check_positive(tokens=tokens)
    most = None if tokens is None else max(1, tokens // seq_len)
    if isinstance(corpus, torch.Tensor):
        return _given_windows(corpus, seq_len, bos, least=1)[:most]
    length = seq_len - (bos is not None)
    [stream] = _tokenised([_SEPARATOR.join(corpus.texts)], tokenizer, bos, special=bos is None)
    count = len(stream) // length
    if count == 0:
        raise UserError(
            f"{corpus.name} holds {len(stream):,} tokens, too few for one evaluation window of {length:,}. "
            "Lower the window's length, or give more text."
        )
    return _with_bos(stream[: count * length].view(count, length)[:most], bos)


def _packed(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, rng: random.Random, *, needed: int, bos: int | None
) -> torch.Tensor:
    """The tokens of shuffled documents, end to end, up to the document with which `needed` are reached."""
    documents = [index for index, text in enumerate(texts) if text.strip()]
    rng.shuffle(documents)
    pieces: list[torch.Tensor] = []
    missing = needed
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        batch = [texts[index] + _SEPARATOR for index in documents[start : start + _DOCUMENTS_AT_ONCE]]
        for ids in _tokenised(batch, tokenizer, bos, special=False):
            pieces.append(ids)
            missing -= len(ids)
            if missing <= 0:
                return torch.cat(pieces)
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _tokenised(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, bos: int | None, *, special: bool
) -> Iterator[torch.Tensor]:
    """(tokens,) int64 for each text.

    A chat template may write BOS into the text; where windows get their own, it is taken off here.
    """
    # verbose=False: "longer than the model's maximum" is a warning about texts that are not to be cut into windows.
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    for ids in encoded["input_ids"]:
        stream = torch.tensor(ids, dtype=torch.int64)
        yield stream[1:] if bos is not None and ids[:1] == [bos] else stream


def _with_bos(windows: torch.Tensor, bos: int | None) -> torch.Tensor:
    """(n, length) windows, with the BOS token in front of each if there is one: (n, length + 1)."""
    if bos is None:
        return windows.contiguous()
    return torch.nn.functional.pad(windows, (1, 0), value=bos)


def _given_windows(ids: torch.Tensor, seq_len: int, bos: int | None, *, least: int) -> torch.Tensor:
    """Check token ids that the user made into windows himself: (n, seq_len), n ≥ least, any integer dtype."""
    wanted = f"token ids must be an integer tensor of shape ({least} or more, {seq_len})"
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"{wanted}; got dtype {ids.dtype}.")
    if ids.ndim != 2 or ids.shape[1] != seq_len or ids.shape[0] < least:
        raise UserError(f"{wanted}; got {tuple(ids.shape)}. Change the tensor, or the number and length of windows.")
    if ids.min() < 0:
        raise UserError(f"{wanted} without negative values; got {int(ids.min())}.")
    if bos is not None and (ids[:, 0] != bos).any():
        raise UserError(
            f"every window must begin with the BOS token {bos} and {int((ids[:, 0] != bos).sum())} of {len(ids)} do "
            "not. Put it in front of each, or use --bos never."
        )
    return ids.to("cpu", torch.int64)


def _check_positive(*, least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise UserError(f"{name} must be {least} or more; got {size}.")
