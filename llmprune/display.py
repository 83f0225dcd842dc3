"""What a person sees: stages, one line a layer with the error of each linear, and the result as a table.

On a terminal a progress bar with the time left stands below the lines; without one the lines are plain. All of this
goes to standard error; the result goes to standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmprune.checkpoint.convert import Conversion
from llmprune.checkpoint.verify import Verification
from llmprune.job import Observer, PruneResult
from llmprune.report.document import PAGE
from llmprune.results import PrunedWeight, TunedPart, percent_with_error, recovery, with_error

__all__ = ["observer_for", "show_conversion", "show_result", "show_verification"]

AS_SAVED = (
    "As saved, zeros are stored like any number: the files are as large and run as fast as the dense model's in "
    "transformers, vLLM and llama.cpp."
)
AS_PACKED = (
    "Packed, the zeros of pruned weights are not stored: transformers loads this after `import llmprune`; for all "
    "other programs `llmprune unpack` gives back every dense tensor, bit for bit."
)


@contextmanager
def observer_for(*, quiet: bool) -> Iterator[Observer]:
    """An observer that prints to standard error, with a progress bar if that is a terminal."""
    if quiet:
        yield Observer()
        return
    console = Console(file=sys.stderr, highlight=False)  # this one, also while others are kept off it
    if not console.is_terminal:
        yield _Lines(console)
        return
    bars = _Bars(console)
    try:
        yield bars
    finally:
        bars.drop()


class _Lines(Observer):
    """One plain line a stage and a layer."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.unbroken = not console.is_terminal  # a terminal would break in the middle of words
        self.row: list[PrunedWeight] = []
        self.parts: list[TunedPart] = []
        self.layers, self.done, self.began = 0, 0, 0.0

    def stage(self, name: str) -> None:
        self.console.print(f"[bold]{name}[/bold]")

    def say(self, sentence: str) -> None:
        self.console.print(f"  {sentence}", style="dim", soft_wrap=self.unbroken)

    def start(self, layers: int) -> None:
        self.layers, self.done, self.began = layers, 0, time.perf_counter()
        self.say("Relative output error of each linear, ‖X(W−Ŵ)ᵀ‖ / ‖XWᵀ‖, on the first batch:")

    def pruned(self, weight: PrunedWeight) -> None:
        self.row.append(weight)

    def tuned(self, part: TunedPart) -> None:
        if part.part != "model":
            self.parts.append(part)
            return
        told = f"{part.before:.3f} → {part.after:.3f} nats a token from the dense model, held-out windows"
        self.say(f"distilled in {part.passes} passes: {told}")

    def layer_done(self, index: int) -> None:
        self.done += 1
        left = (time.perf_counter() - self.began) / self.done * (self.layers - self.done)
        self._print_layer(index, "" if self._shows_time() else f"  {_duration(left)} left")
        self.row, self.parts = [], []

    def _shows_time(self) -> bool:
        return False

    def _print_layer(self, index: int, ending: str) -> None:
        shown = "  ".join(f"{name} {error}" for name, error in _errors(self.row))
        self.console.print(
            f"  layer {index + 1:>{len(str(self.layers))}}/{self.layers}  {shown}{ending}", soft_wrap=self.unbroken
        )
        if self.parts:
            told = "  ".join(
                f"{part.part.rpartition('.')[2]} {part.before:.4f} → {part.after:.4f}" for part in self.parts
            )
            self.console.print(f"    tuned: {told}", soft_wrap=self.unbroken)
        for note in dict.fromkeys(note for weight in self.row for note in weight.notes):
            count = sum(note in weight.notes for weight in self.row)
            self.console.print(f"    note: {note}{f' ({count} weights)' if count > 1 else ''}", soft_wrap=self.unbroken)


class _Bars(_Lines):
    """The same lines, with a bar below them.

    It has the screen only while there is something to show: meanwhile each step of another's bar (of a download, of the
    Hub's upload) would become a line of its own.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bar: tuple[Progress, TaskID] | None = None

    def drop(self) -> None:
        """Take the bar off the screen, if there is one."""
        if self.bar is not None:
            self.bar[0].stop()
            self.bar = None

    def stage(self, name: str) -> None:
        self.drop()
        super().stage(name)

    def start(self, layers: int) -> None:
        super().start(layers)
        self._show("layers", 0, layers)

    def layer_done(self, index: int) -> None:
        super().layer_done(index)
        if self.bar is not None:
            self.bar[0].advance(self.bar[1])

    def evaluated(self, done: int, total: int) -> None:
        self._show("measured", done, total)
        if done == total:
            self.drop()

    def distilled(self, done: int, total: int) -> None:
        if done == 1:
            self.drop()  # of the layers
        self._show("distillation", done, total)

    def _show(self, what: str, done: int, total: int) -> None:
        if self.bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            progress = Progress(*columns, console=self.console, transient=True)
            self.bar = (progress, progress.add_task(f"  {what}", total=total))
            progress.start()
        progress, task = self.bar
        progress.update(task, completed=done)

    def _shows_time(self) -> bool:
        return True


def _errors(weights: list[PrunedWeight]) -> Iterator[tuple[str, str]]:
    """Short name and error of each linear; the experts of a stack together, as their mean."""
    stacks: dict[str, list[PrunedWeight]] = {}
    for weight in weights:
        stacks.setdefault(weight.parameter, []).append(weight)
    for name, stack in stacks.items():
        errors = [weight.error for weight in stack if weight.error is not None]
        mean = f"{sum(errors) / len(errors):.3f}" if errors else "n/a"
        short = name.removesuffix(".weight").rpartition(".")[2]
        yield (short if stack[0].expert is None else f"{short}×{len(stack)}"), mean


def show_result(result: PruneResult) -> None:
    """The outcome on standard output: quality, sparsity, size, cost, where it is, and what it is good for."""
    console, report = Console(highlight=False), result.report
    if report.before:
        console.print(_evaluations(report.before, report.after))
        for generation in report.generations:
            _show_generation(console, generation)
        console.print()
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(result):
        facts.add_row(f"[bold]{name}[/bold]", value)
    console.print(facts)
    console.print(AS_SAVED if result.dense_bytes is None else AS_PACKED, style="dim")
    for note in report.notes:
        console.print(f"note: {note}", style="dim")


def _evaluations(before: tuple[dict[str, Any], ...], after: tuple[dict[str, Any], ...]) -> Table:
    """Dense beside pruned: a line for each perplexity and task, and how far the pruned model is from the dense one."""
    table = Table("", "dense", "pruned", "recovery", "on", caption_justify="left")
    captions = ["Recovery: of a perplexity dense / pruned, of an accuracy pruned / dense."]
    for dense, pruned in zip(before, after, strict=True):
        left = recovery(dense, pruned)
        share = "" if left is None else f"{left:.1f} %"
        if dense["kind"] == "zero_shot":
            name, amount, text = f"{dense['task']} {dense['metric']}", f"{pruned['items']:,} items", percent_with_error
        else:
            name, amount, text = f"perplexity on {dense['dataset']}", f"{pruned['tokens']:,} tokens", with_error
        table.add_row(name, text(*_number(dense)), text(*_number(pruned)), share, amount)
        captions.append(pruned["protocol"])
        if (far := pruned.get("divergence")) is not None:
            kl, agreement = (far["kl"], far["kl_standard_error"]), (far["top1_agreement"], far["top1_standard_error"])
            table.add_row("  KL from dense, nats a token", "", with_error(*kl), "", "")
            table.add_row("  top-1 agreement with dense", "", percent_with_error(*agreement), "", "")
            captions.append(far["protocol"])
    table.caption = "\n".join(dict.fromkeys(captions))
    return table


def _show_generation(console: Console, generation: dict[str, Any]) -> None:
    """What both models write after a prompt, as Python writes strings: on one line each, where that is no terminal."""
    for name in ("prompt", "dense", "pruned"):
        console.print(f"{name:<8}{generation[name]!r}", markup=False, soft_wrap=not console.is_terminal)


def _number(row: dict[str, Any]) -> tuple[float, float | None]:
    return row["value"], row["standard_error"]


def _facts(result: PruneResult) -> Iterator[tuple[str, str]]:
    report, counts = result.report, result.report.totals
    yield "pruned", f"{counts['pruned_weights']} weights to {report.config['sparsity']} by {report.config['method']}"
    of_pruned, of_all = (
        counts[zeros] / max(1, counts[of])
        for zeros, of in (("pruned_zeros", "pruned_parameters"), ("zeros", "parameters"))
    )
    yield "sparsity", f"{of_pruned:.2%} of the pruned weights, {of_all:.2%} of all {counts['parameters']:,} parameters"
    yield "time", ", ".join(f"{name} {_duration(seconds)}" for name, seconds in report.seconds.items())
    yield (
        "peak memory",
        ", ".join(f"{size / 2**20:,.0f} MiB ({where})" for where, size in report.peak_memory_bytes.items()),
    )
    if result.directory is not None:
        size = sum(path.stat().st_size for path in result.directory.glob("*.safetensors"))
        told = _mebibytes(size) if result.dense_bytes is None else _gain(result.dense_bytes, size)
        yield "saved", f"{result.directory} ({told} of weights, verified)"
        yield "report", str(result.directory / PAGE)
    if result.url is not None:
        yield "pushed", str(result.url)
        yield "commit", f"{result.commit}, with every file as it is here"


def show_verification(result: Verification) -> None:
    """Every check with its outcome, on standard output."""
    console = Console(highlight=False)
    for check in result.checks:
        mark = "[green]ok    [/green]" if check.ok else "[red]FAILED[/red]"
        console.print(f"{mark}  {check.what} ({check.count:,})", soft_wrap=True)
        if not check.ok:
            console.print(f"        {check.detail}", soft_wrap=True)
    console.print(
        f"{result.directory} is {'what its report says' if result.ok else 'NOT what its report says'}.", soft_wrap=True
    )


def show_conversion(done: Conversion, verb: str) -> None:
    """What became of a checkpoint's size, on standard output. `verb` is "packed" or "unpacked"."""
    console = Console(highlight=False)
    count = sum(done.patterns.values())
    which = ", ".join(f"{number} {pattern}" for pattern, number in sorted(done.patterns.items()))
    console.print(
        f"{done.directory}: {_gain(done.before, done.after)} of weights; {count} of {done.tensors} tensors {verb} "
        f"({which}), the others as they were.",
        soft_wrap=True,
    )
    for note in done.notes:
        console.print(f"note: {note}", style="dim", soft_wrap=True)


def _gain(before: int, after: int) -> str:
    return f"{_mebibytes(before)} → {_mebibytes(after)}, {after / before:.1%},"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.{0 if size >= 2**24 else 2}f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
