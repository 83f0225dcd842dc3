"""`llmprune bench DIR`: the packed model and the same model dense, side by side in one run.

Both are in memory at once and take turns, so that whatever else the machine does meets both. Every round generates from
the same prompt, greedily; medians are told. The dense model has the packed one's weights, bit for bit. Peak memory is
that of a process of its own for each, which loads the model, generates a little, and tells.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import click
import torch
from torch import nn

from llmprune.errors import UserError
from llmprune.runtime.generate import Clock, generate, model_options, prompt_tokens
from llmprune.runtime.opening import Opened, Wanted, form_of, nothing_packed, open_model, token_ids
from llmprune.runtime.sparsify import densify, sparsify
from llmprune.runtime.timing import about

__all__ = ["Bench", "Measured", "bench", "bytes_per_token", "command"]

PROMPT_TOKENS = 128
"""Of a prompt drawn at random, where none is given."""


@dataclass
class Measured:
    """One of the two models. Times are medians over the rounds.

    weights : bytes of its weights in memory
    bytes_per_token : of weights that a token reads
    peak_memory : bytes, of a process that loads it and generates; None if it was not asked for
    prefill : tokens of the prompt per second; first_token : seconds to the first new token
    decode : new tokens per second after the first
    """

    weights: int
    bytes_per_token: int
    peak_memory: dict[str, int] | None = None
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """Both models and what they have in common.

    unpacked_weights : packed in the checkpoint and dense in memory in both, as fused experts are
    differs_at : the first new token that is not the same, counted from 0; None if all are
    """

    model: str
    packed_linears: int
    unpacked_weights: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    dense: Measured
    sparse: Measured
    differs_at: int | None
    about: dict[str, Any]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster, or smaller, the packed model is."""
        dense, sparse = self.dense, self.sparse
        found = {
            "prefill": sparse.prefill / dense.prefill,
            "decode": sparse.decode / dense.decode,
            "first_token": dense.first_token / sparse.first_token,
            "bytes_per_token": dense.bytes_per_token / sparse.bytes_per_token,
            "weights": dense.weights / sparse.weights,
        }
        for device in set(dense.peak_memory or {}) & set(sparse.peak_memory or {}):
            found[f"peak memory {device}"] = (dense.peak_memory or {})[device] / (sparse.peak_memory or {})[device]
        return found


def bench(wanted: Wanted, prompt: str | None, *, new_tokens: int, rounds: int, memory: bool = True) -> Bench:
    """Measure a packed checkpoint against its dense twin.

    A dense checkpoint whose linears are sparse enough is packed in memory; its peak memory is then not told, because
    loading it dense takes the dense model's.

    Raises
    ------
    UserError
        if the model cannot be loaded, nothing in it is worth packing, or it does not take so many tokens.
    """
    sparse, dense, stored_packed = _both(wanted)
    ids = _random_prompt(sparse, new_tokens) if prompt is None else token_ids(sparse, prompt)
    rows = {"dense": _still(dense), "sparse": _still(sparse)}
    for opened in (sparse, dense):  # kernels are compiled and forms made
        _run(opened, ids, 2)
    _take_turns({"dense": dense, "sparse": sparse}, rows, ids, new_tokens=new_tokens, rounds=rounds)
    if memory and stored_packed:
        for form, row in rows.items():
            row.peak_memory = _peak_of_process(wanted, form, new_tokens=new_tokens)
    pairs = list(zip(rows["dense"].tokens, rows["sparse"].tokens))
    return Bench(
        model=wanted.name,
        packed_linears=sparse.packed,
        unpacked_weights=sparse.unpacked,
        prompt_tokens=ids.shape[1],
        new_tokens=new_tokens,
        rounds=rounds,
        dense=rows["dense"],
        sparse=rows["sparse"],
        differs_at=next((place for place, (one, other) in enumerate(pairs) if one != other), None),
        about=about(sparse.device),
    )


def _both(wanted: Wanted) -> tuple[Opened, Opened, bool]:
    """(sparse, dense, whether the checkpoint is packed)."""
    first, second = open_model(wanted), open_model(wanted)
    if first.packed:
        densify(second.model)
        return first, second, True
    count = sparsify(first.model)
    if not count:
        raise nothing_packed(first, wanted.name)
    return replace(first, packed=count), second, False


def _random_prompt(opened: Opened, new_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    words = opened.model.config.get_text_config().vocab_size
    length = prompt_tokens(opened, PROMPT_TOKENS, new_tokens=new_tokens)
    return torch.randint(words, (1, length), generator=generator).to(opened.device)


def _still(opened: Opened) -> Measured:
    """What can be told without running it."""
    tensors = [*opened.model.parameters(), *opened.model.buffers()]
    return Measured(weights=sum(tensor.nbytes for tensor in tensors), bytes_per_token=bytes_per_token(opened.model))


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that one token's forward reads: one row of an embedding, of experts those that are chosen."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    total = 0
    for module in model.modules():  # an output matrix that is the embedding's too is met twice, and read once whole
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if isinstance(module, nn.Embedding):
                total += tensor[:1].nbytes
            elif tensor.ndim == 3 and chosen:
                total += tensor.nbytes // tensor.shape[0] * chosen
            else:
                total += tensor.nbytes
    return total


def _run(opened: Opened, ids: torch.Tensor, new_tokens: int) -> Clock:
    clock = Clock()
    generate(opened, ids, clock, new_tokens=new_tokens, to_the_end=True)
    return clock


def _take_turns(
    models: dict[str, Opened], rows: dict[str, Measured], ids: torch.Tensor, *, new_tokens: int, rounds: int
) -> None:
    """Rounds in which each model generates once, in changing order, into `rows`."""
    clocks: dict[str, list[Clock]] = {form: [] for form in models}
    for turn in range(rounds):
        for form in sorted(models, reverse=turn % 2 == 1):
            clocks[form].append(_run(models[form], ids, new_tokens))
    for form, row in rows.items():
        row.first_token = statistics.median(clock.speed.first for clock in clocks[form])
        row.prefill = ids.shape[1] / row.first_token
        row.decode = statistics.median(clock.speed.tokens_per_second or 0.0 for clock in clocks[form])
        row.tokens = clocks[form][0].tokens


def _peak_of_process(wanted: Wanted, form: str, *, new_tokens: int) -> dict[str, int]:
    task = json.dumps({"wanted": asdict(wanted), "form": form, "new_tokens": new_tokens})
    command = [sys.executable, "-m", "llmprune.runtime.peak", task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise UserError(
            f"the process that takes the {form} model's peak memory ended with status {done.returncode} "
            f"({said.strip().rstrip('.')}); --no-memory leaves it out."
        )
    peak: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peak


@click.command(help="Dense and packed side by side: speed, memory, and whether they say the same. DIR may be a hub id.")
@model_options
@click.option("--prompt", help=f"Text to go on from.  [default: {PROMPT_TOKENS} tokens drawn at random]")
@click.option("--max-new-tokens", type=click.IntRange(2), default=64, show_default=True, help="New tokens each time.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Times that each model runs.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Measure peak memory in processes apart.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    *, prompt: str | None, max_new_tokens: int, rounds: int, memory: bool, as_json: bool, **wanted: Any
) -> None:
    found = bench(Wanted(**wanted), prompt, new_tokens=max_new_tokens, rounds=rounds, memory=memory)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"ratios": found.ratios}, indent=2))
    else:
        click.echo("\n".join(_lines(found)))


def _lines(found: Bench) -> Sequence[str]:
    ratios, lines = found.ratios, [f"{'':<26}{'dense':>12}{'packed':>12}{'ratio':>9}"]
    peaks = [name for name in ratios if name.startswith("peak memory")]
    for name, unit, scale in (
        ("decode", "tokens/s", 1.0),
        ("prefill", "tokens/s", 1.0),
        ("first_token", "s", 1.0),
        ("bytes_per_token", "MB", 1e-6),
        ("weights", "MB", 1e-6),
    ):
        both = [getattr(row, name) * scale for row in (found.dense, found.sparse)]
        lines.append(_row(f"{name.replace('_', ' ')}, {unit}", both, ratios[name]))
    for name in peaks:
        device = name.removeprefix("peak memory ")
        both = [(row.peak_memory or {})[device] * 1e-6 for row in (found.dense, found.sparse)]
        lines.append(_row(f"{name}, MB", both, ratios[name]))
    told = ", ".join(f"{key} {value}" for key, value in found.about.items() if value is not None)
    form = form_of(found.packed_linears, found.unpacked_weights)
    return [*lines, _told_text(found), f"{form}; medians of {found.rounds}; {told}."]


def _row(name: str, both: list[float], ratio: float) -> str:
    return f"{name:<26}" + "".join(f"{value:>12.4g}" for value in both) + f"{ratio:>8.2f}×"


def _told_text(found: Bench) -> str:
    if found.differs_at is None:
        return f"The same {found.new_tokens} tokens from both."
    return (
        f"The same {found.differs_at} tokens from both, then another: sums are added up in another order, and where "
        "two words are almost equally likely, rounding (to bfloat16 above all) decides."
    )
