"""Tuning and timing of single products: every config is checked before it is timed, and none stops the others.

An error that a config raises (too much shared memory, a shape that a library refuses) and a result that is wrong are
noted beside its name. Only a fault that leaves the GPU unusable for this process ends the run (`Broken`).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu_candidates import GpuCandidate, candidates_for, poison_scratch
from gpu_clock import Device, errors, laps, poisoned, repeats_for
from gpu_rows import OURS, SAMPLED, Measured, Row, Tuned, memory_needed, nearest
from gpu_weights import DTYPE, Weight
from kernel_benchmarks import Case
from torch import Tensor

__all__ = ["Bench", "Broken"]

LARGEST_ERROR, LARGEST_RMS_ERROR = 3e-2, 4e-3
"""Against float64, in units of the truth's root mean square: a rounding to bfloat16 of numbers up to five times it."""

SWEEP_ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 5, 3
"""Of tuning: every config by itself, then the best of them and the default in turns."""

BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 2e12, 4e14
"""A guess at what a GPU does, from which the number of calls in a graph follows. An H100 does more of both."""


class Broken(RuntimeError):
    """The GPU answers nothing any more: a kernel wrote or read where it must not."""


class Wrong(RuntimeError):
    """A result that is not the product."""


@dataclass(frozen=True)
class _Inputs:
    """x (tokens, columns), some tokens of it, and the product for these in float64."""

    x: Tensor
    sampled: Tensor
    truth: Tensor


class Bench:
    """Measures cases on a device; keeps one weight, so that cases of one weight should come together."""

    def __init__(self, device: Device, *, seed: int = 0, rounds: int = 7) -> None:
        self.device, self.seed, self.rounds = device, seed, rounds
        self._weight: Weight | None = None

    def tune(self, case: Case, seconds: float) -> list[Tuned]:
        """The best settings of each of our candidates that has a choice, within about so many seconds.

        Raises
        ------
        Broken
            if the GPU does not go on.
        """
        ways = {n: (w, words) for n, (w, words) in self._candidates(case).items() if w.role == OURS and len(words) > 1}
        if not ways or self._refusal(case) is not None:
            return []
        inputs, total = self._inputs(case), sum(len(words) for _, words in ways.values())
        return [
            self._tune(case, inputs, way, words, seconds=seconds * len(words) / total) for way, words in ways.values()
        ]

    def _tune(self, case: Case, inputs: _Inputs, way: GpuCandidate, words: Sequence[str], *, seconds: float) -> Tuned:
        """Default first, the others in random order, so that what the time does not suffice for is a fair sample."""
        found = Tuned(case, way.name, default=words[0], listed=len(words))
        others = list(words[1:])
        random.Random(self.seed).shuffle(others)
        began = time.perf_counter()
        # Configs that share a form come together: making one takes longer than timing it.
        for word in [words[0], *sorted(others, key=way.form_key)]:
            if found.tried > 1 and time.perf_counter() - began > seconds:
                break
            found.tried += 1
            run = self._attempt(case, inputs, way, word)
            if isinstance(run, Measured):
                found.failures[word] = run.failure or ""
            else:
                found.times[word] = statistics.median(laps({word: run[0]}, SWEEP_ROUNDS)[word]) * 1e6
        self._final(case, inputs, way, found)
        return found

    def _final(self, case: Case, inputs: _Inputs, way: GpuCandidate, found: Tuned) -> None:
        """The best few and the default once more, in turns: alone each may have met another clock."""
        best = sorted(found.times, key=found.times.__getitem__)[:FINALISTS]
        runs = {}
        for word in dict.fromkeys([*best, *([found.default] if found.default in found.times else [])]):
            run = self._attempt(case, inputs, way, word)
            if not isinstance(run, Measured):
                runs[word] = run[0]
        for word, seconds in laps(runs, FINAL_ROUNDS).items():
            found.times[word] = statistics.median(seconds) * 1e6
        if runs:
            found.config = min(runs, key=found.times.__getitem__)
            found.microseconds = found.times[found.config]
        found.default_microseconds = found.times.get(found.default)

    def row(self, case: Case, tuned: Sequence[Tuned] = ()) -> Row:
        """Every candidate in one case, with the settings that tuning found best for it or for the nearest case.

        Raises
        ------
        Broken
            if the GPU does not go on.
        """
        if (refusal := self._refusal(case)) is not None:
            return Row(case, [Measured(n, w.role, failure=refusal) for n, (w, _) in self._candidates(case).items()])
        inputs, runs, results = self._inputs(case), {}, []
        for name, (way, words) in self._candidates(case).items():
            word = next((word for word in nearest(case, tuned, name) if word in words), words[0])
            run = self._attempt(case, inputs, way, word)
            if isinstance(run, Measured):
                results.append(run)
            else:
                runs[name] = run[0]
                results.append(Measured(name, way.role, word, error=run[1]))
        found = laps(runs, self.rounds)
        for result in results:
            result.rounds = [seconds * 1e6 for seconds in found.get(result.way, [])]
        return Row(case, results)

    def _candidates(self, case: Case) -> dict[str, tuple[GpuCandidate, list[str]]]:
        return candidates_for(case, self.device.capability)

    def _refusal(self, case: Case) -> str | None:
        """Why there is no room for a case."""
        needed = memory_needed(case, self.device.cache)
        held = self._weight is not None and (
            self._weight.case.rows,
            self._weight.case.columns,
            self._weight.case.pattern,
        )
        if held == (case.rows, case.columns, case.pattern):
            return None
        self._weight = None
        free = self.device.free()
        return f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if free < needed else None

    def _inputs(self, case: Case) -> _Inputs:
        """Makes the case's weight, too."""
        if self._weight is None:
            self._weight = Weight(case, self.device.device, self.seed)
        generator = torch.Generator(self.device.device).manual_seed(self.seed + 1)
        shape = (case.tokens, case.columns)
        x = torch.randn(shape, generator=generator, device=self.device.device, dtype=torch.float32).to(DTYPE)
        count = min(case.tokens, SAMPLED)
        sampled = torch.linspace(0, case.tokens - 1, count, dtype=torch.float64).long().to(self.device.device)
        return _Inputs(x, sampled, x[sampled].double() @ self._weight.dense.double().T)

    def _attempt(
        self, case: Case, inputs: _Inputs, way: GpuCandidate, word: str
    ) -> tuple[Callable[[], float], float] | Measured:
        """(seconds of one product when called, root-mean-square error); or why there is no such thing."""
        assert self._weight is not None
        try:
            forms = self._weight.forms(way, word, self.device.cache)
            error = self._check(inputs, way, word, forms[0])
            repeats = repeats_for(len(forms), _guess(case))
            calls = [_call(inputs.x, way, word, form) for form in forms] * repeats
            lap = self.device.record(calls)
            return (lambda: lap() / len(calls)), error  # it holds the calls, and these the tensors that a graph reads
        except Exception as error:  # compilers, drivers and libraries each have their own
            self._still_alive(case, way, word)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return Measured(way.name, way.role, word, failure=reason, wrong=isinstance(error, Wrong))

    def _check(self, inputs: _Inputs, way: GpuCandidate, word: str, form: object) -> float:
        """The root-mean-square error of a product."""
        with poisoned():
            poison_scratch()
            y = way.product(inputs.x, form, word)
        largest, rms = errors(y[inputs.sampled], inputs.truth)
        if not (largest <= LARGEST_ERROR and rms <= LARGEST_RMS_ERROR):
            raise Wrong(f"wrong result: largest error {largest:.3g}, root mean square {rms:.3g} of the truth's")
        return rms

    def _still_alive(self, case: Case, way: GpuCandidate, word: str) -> None:
        try:
            self.device.wait()
        except Exception as error:
            shape = f"{case.rows}x{case.columns}, {case.pattern}, {case.tokens} tokens"
            raise Broken(f"after {way.name} {word} at {shape}: {' '.join(str(error).split())[:300]}") from error


def _call(x: Tensor, way: GpuCandidate, word: str, form: object) -> Callable[[], object]:
    return lambda: way.product(x, form, word)


def _guess(case: Case) -> float:
    """Seconds of one dense product, roughly."""
    entries = case.rows * case.columns
    return max(2 * entries / BYTES_PER_SECOND, 2 * entries * case.tokens / OPERATIONS_PER_SECOND)
