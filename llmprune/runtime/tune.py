"""`llmprune tune DIR`: time every path for each kind of weight in a model, so that the dispatcher knows this machine.

Weights of one shape, dtype, pattern and density are one kind. A path is timed over as many of the model's own weights
of that kind as do not fit in the caches together, in turns with the other paths; on a GPU as one CUDA graph, because
there a launch takes longer than a small product.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import click
import torch
from torch import Tensor

from llmprune.machine import device_named
from llmprune.runtime import timing
from llmprune.runtime.dispatch import choose
from llmprune.runtime.generate import model_options
from llmprune.runtime.opening import Wanted, nothing_packed, open_model
from llmprune.runtime.paths import paths
from llmprune.runtime.placement import sparse_linears
from llmprune.runtime.sparsify import sparsify
from llmprune.runtime.weight import Path, SparseWeight

__all__ = ["Tuned", "command", "tune", "tune_weights"]

TOKENS = {"cpu": (1, 2, 4, 8, 16, 32, 64, 256, 1024), "cuda": tuple(2**power for power in range(13))}
"""Numbers of tokens that are timed; others go as the nearest of them."""

ROTATED_BYTES = 192 * 2**20
"""Weights that are met in turn fill so much memory, if the model has so many: more than the caches of most machines."""

ROUNDS = 7
ENOUGH_SECONDS = 2.0
"""Spent on one kind of weight and one number of tokens, after two rounds at least."""


@dataclass
class Tuned:
    """What was found for one kind of weight: microseconds by tokens and path, the choice by tokens, and what each path
    said that cannot run here with so many tokens (the fewest that were tried)."""

    kind: str
    count: int
    microseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)


def tune(wanted: Wanted, *, may_hold: bool = False, seconds: float = ENOUGH_SECONDS) -> Iterator[Tuned]:
    """Time all kinds of packed weights of a model; each is stored as soon as it is done.

    may_hold : let the dispatcher hold a weight dense, at the dense model's memory, where that was faster

    Raises
    ------
    UserError
        if nothing in the model is packed or worth packing.
    """
    opened = open_model(wanted)
    if not opened.packed and not sparsify(opened.model):
        raise nothing_packed(opened, wanted.name)
    weights = [SparseWeight(module.packed(), module.bias) for module in sparse_linears(opened.model).values()]
    del opened
    yield from tune_weights(weights, may_hold=may_hold, seconds=seconds)


def tune_weights(weights: Iterable[SparseWeight], *, may_hold: bool = False, seconds: float) -> Iterator[Tuned]:
    """Time all kinds among `weights`, which are on one device."""
    kinds: dict[str, list[SparseWeight]] = {}
    for weight in weights:
        kinds.setdefault(timing.described(weight), []).append(weight)
    for kind, alike in kinds.items():
        device = alike[0].device
        found = Tuned(kind, len(alike))
        for tokens in TOKENS.get(device.type, TOKENS["cpu"]):
            found.microseconds[str(tokens)] = _times(alike, tokens, found.unable, seconds=seconds)
        timing.store(device, timing.Timings({kind: found.microseconds}, may_hold))
        for tokens in found.microseconds:
            names = tuple(paths(alike[0], int(tokens)))
            found.chosen[tokens] = choose(alike[0], int(tokens), names)
        for weight in alike:
            weight.forget()
        yield found


def _times(alike: list[SparseWeight], tokens: int, unable: dict[str, str], *, seconds: float) -> dict[str, float]:
    """Microseconds of each path for one product with so many tokens: medians over rounds, the paths in turns.

    A path that cannot run here, such as a kernel that asks for more shared memory than this GPU has, is left out, and
    what it said goes into `unable`. `expand` is what all else stands on: its error is raised.
    """
    some = alike[: max(1, math.ceil(ROTATED_BYTES / max(1, alike[0].packed.nbytes)))]
    first = some[0]
    x = torch.randn(tokens, first.in_features, device=first.device).to(first.dtype)
    timed: dict[str, Callable[[], float]] = {}
    with torch.inference_mode():
        for name in paths(first, tokens):
            try:
                ways = [paths(weight, tokens)[name]() for weight in some]
                timed[name] = _on_gpu(ways, x) if x.is_cuda else _on_cpu(ways, x)
            except Exception as error:
                if name == "expand" or not _is_refusal(error):
                    raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                unable.setdefault(name, f"with {tokens} tokens: {reason}")
        laps: dict[str, list[float]] = {name: [] for name in timed}
        began = time.perf_counter()
        for turn in range(ROUNDS):
            if turn >= 2 and time.perf_counter() - began > seconds:
                break
            for name, run in timed.items():
                laps[name].append(run() / len(some))
    return {name: round(1e6 * statistics.median(times), 2) for name, times in laps.items()}


def _is_refusal(error: Exception) -> bool:
    """Whether torch or triton say that a device cannot do what it is asked for, too little memory included."""
    return isinstance(error, RuntimeError) or any(kind.__name__ == "TritonError" for kind in type(error).__mro__)


def _on_cpu(ways: list[Path], x: Tensor) -> Callable[[], float]:
    """A function that goes through all `ways` once and gives the seconds that it took."""
    for way in ways:  # what a path makes at its first call is not counted
        way(x)

    def run() -> float:
        began = time.perf_counter()
        for way in ways:
            way(x)
        return time.perf_counter() - began

    return run


def _on_gpu(ways: list[Path], x: Tensor) -> Callable[[], float]:
    """The same on a GPU, its launches recorded once."""
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))  # which makes `x` and the weights' second forms
    with torch.cuda.stream(stream):
        for way in ways:  # kernels are compiled and second forms made before anything is recorded
            way(x)
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for way in ways:
            way(x)

    def run() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return run


@click.command(help="Time the ways to multiply with a model's packed weights, for this machine. DIR may be a hub id.")
@model_options
@click.option(
    "--allow-dense", is_flag=True, help="Let weights be held dense too, where that is faster; it takes dense memory."
)
@click.option(
    "--seconds", type=float, default=ENOUGH_SECONDS, show_default=True, help="For one kind of weight and tokens."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the times as JSON.")
def command(*, allow_dense: bool, seconds: float, quiet: bool, as_json: bool, **wanted: Any) -> None:
    every = []
    for found in tune(Wanted(**wanted), may_hold=allow_dense, seconds=seconds):
        every.append(asdict(found))
        if not (quiet or as_json):
            click.echo("\n".join(_lines(found)))
    file = timing.timings_file(device_named(wanted["device"]))
    if as_json:
        click.echo(json.dumps({"file": str(file), "weights": every}, indent=2))
    elif not quiet:
        click.echo(f"Kept in {file}", err=True)


def _lines(found: Tuned) -> list[str]:
    """One line for each number of tokens: what is chosen, its time, and the others'."""
    lines = [f"{found.kind} ({found.count} weights)"]
    for tokens, times in found.microseconds.items():
        chosen = found.chosen[tokens]
        others = sorted((value, name) for name, value in times.items() if name != chosen)[:3]
        told = ", ".join(f"{name} {value:,.0f}" for value, name in others)
        lines.append(f"  {tokens:>5} tokens  {chosen} {times.get(chosen, 0):,.0f} µs  ({told})")
    return lines + [f"  {name} cannot run here {reason}" for name, reason in found.unable.items()]
