"""The parts of gpu_check, one after another, within the time that it has. Start it by `scripts/gpu_check`."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import gpu_model
import torch
from gpu_clock import Device, Gpu, settings_of_driver
from gpu_compile import compile_ahead, jobs
from gpu_measure import Bench, Broken
from gpu_model import LLAMA_8B, SMALL, ModelResult
from gpu_rows import Measured, Plan, Row, Tuned, made_plan
from gpu_table import failures, goals, markdown, model_lines, table
from gpu_tests import run_tests
from kernel_benchmarks import Case
from rich.console import Console
from rich.table import Table

import llmprune

PARTS = ("correctness", "tune", "kernels", "model")

SHARES = {"correctness": 0.35, "tune": 0.6, "kernels": 0.85, "model": 1.0}
"""Of the time, how much may be over when a part ends."""

COMPILING = 90.0
"""Seconds that compiling a model of 32 layers twice may take; it is not begun with less left."""

WIDE = 220
"""Characters of a line where the table goes into a file."""


@dataclass
class Result:
    """All that a run leaves; parts that were not run keep what an earlier run in the same place found."""

    about: dict[str, str]
    command: str
    seed: int
    correctness: dict[str, Any] | None = None
    tuned: list[Tuned] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    model: ModelResult | None = None
    notes: list[str] = field(default_factory=list)
    broken: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether any kernel computed something else."""
        rows = any(m.wrong for row in self.rows for m in row.measured)
        tuned = any("wrong result" in reason for t in self.tuned for reason in t.failures.values())
        failed = self.correctness is not None and not self.correctness["passed"]
        return failed or rows or tuned or self.broken is not None

    def as_json(self) -> dict[str, Any]:
        """Everything, with goals and ratios written out."""
        return {
            "command": self.command,
            "seed": self.seed,
            "about": self.about,
            "correctness": self.correctness,
            "tuned": [asdict(t) for t in self.tuned],
            "rows": [row.as_json() for row in self.rows],
            "model": None if self.model is None else self.model.as_json(),
            "goals": [{**asdict(goal), "met": goal.met} for goal in goals(self.rows, self.model)],
            "failures": failures(self.rows, self.tuned),
            "notes": self.notes,
            "broken": self.broken,
        }


class Deadline:
    """How much time a part has left."""

    def __init__(self, minutes: float, parts: Sequence[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._began, self._seconds = clock, clock(), 60 * minutes
        before = max((SHARES[p] for p in PARTS if p not in parts and PARTS.index(p) < PARTS.index(parts[0])), default=0)
        after = SHARES[parts[-1]]
        self._share = {part: (SHARES[part] - before) / (after - before) for part in parts}

    def left(self, part: str) -> float:
        """Seconds."""
        return self._began + self._share[part] * self._seconds - self._clock()


def about(device: Device) -> dict[str, str]:
    """What ran, and on what."""
    gpu = torch.cuda.get_device_name(device.device) if device.device.type == "cuda" else str(device.device)
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda or "", "python": platform.python_version()}
    for name in ("triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    library = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    driver = settings_of_driver() if device.device.type == "cuda" else {}
    return {
        "device": gpu,
        "L2": f"{device.cache / 2**20:.0f} MiB",
        **driver,
        **versions,
        "cuSPARSELt": str(library or ""),
        "llmprune": llmprune.__version__,
    }


# Parts ----------------------------------------------------------------------------------------------------------------


def tune(bench: Bench, plan: Plan, left: Callable[[], float], result: Result) -> None:
    """Compile, then time, each case within its share of what is left."""
    if bench.device.device.type == "cuda":
        todo = jobs(plan.tune, bench.device.capability)
        count, seconds = compile_ahead(todo, 0.5 * left())
        click.echo(f"{len(todo)} kernels compiled by {count} processes in {seconds:.0f} s", err=True)
    result.tuned = []
    for done, case in enumerate(plan.tune):
        if left() <= 0:
            result.notes.append(f"{len(plan.tune) - done} cases were not tuned: no time was left")
            return
        for found in bench.tune(case, left() / (len(plan.tune) - done)):
            result.tuned.append(found)
            click.echo(f"{_named(case)}: {_told(found)}", err=True)


def _named(case: Case) -> str:
    return f"{case.rows}x{case.columns} {case.pattern}, {case.tokens} tokens"


def _told(found: Tuned) -> str:
    tried = f"{found.tried} of {found.listed} tried, {len(found.failures)} failed"
    times = [_time(found.microseconds), f"(default {_time(found.default_microseconds)}; {tried})"]
    return " ".join([found.way, found.config, *times])


def _time(microseconds: float | None) -> str:
    return "failed" if microseconds is None else f"{microseconds:.1f} µs"


def measure(bench: Bench, plan: Plan, left: Callable[[], float], result: Result) -> None:
    """All rows for which there is time."""
    result.rows = []
    for done, case in enumerate(plan.measure):
        if left() <= 0:
            result.notes.append(f"{len(plan.measure) - done} rows were not measured: no time was left")
            return
        row = bench.row(case, result.tuned)
        result.rows.append(row)
        best = row.best()
        told = "none" if best is None else f"{best.way} {best.median:.1f} µs"
        click.echo(f"{_named(case)}: cuBLAS {row.dense:.1f} µs, {told}", err=True)


def model(device: Device, left: Callable[[], float], result: Result, *, small: bool) -> None:
    """End to end, if there is room."""
    sizes = SMALL if small else LLAMA_8B
    free = device.free()
    if free < sizes.memory_needed:
        result.notes.append(
            f"the model needs {sizes.memory_needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free: not measured"
        )
        return
    result.model = gpu_model.run_model(
        sizes, device, seed=result.seed, tuned=result.tuned, compile_too=lambda: left() > (10 if small else COMPILING)
    )
    if not any(mode.name == "compiled" for mode in result.model.modes):
        result.notes.append("the model was not measured compiled: too little time was left (--only model has more)")


# All of it ------------------------------------------------------------------------------------------------------------


def run(
    device: Device,
    result: Result,
    parts: Sequence[str],
    *,
    minutes: float,
    small: bool,
    words: Sequence[str],
    save: Callable[[], None] = lambda: None,
) -> None:
    """The parts in order, the result saved after each. Stops where a test fails: nothing wrong is worth timing."""
    deadline, plan = Deadline(minutes, parts), made_plan(small=small)
    try:
        if "correctness" in parts:
            folder = Path(llmprune.__file__).parents[1]
            result.correctness = run_tests(folder, deadline.left("correctness"), words)
            click.echo(f"correctness: {result.correctness['summary']}", err=True)
            save()
            if not result.correctness["passed"]:
                return
        bench = Bench(device, seed=result.seed)
        if "tune" in parts:
            tune(bench, plan, lambda: deadline.left("tune"), result)
            save()
        if "kernels" in parts:
            measure(bench, plan, lambda: deadline.left("kernels"), result)
            save()
        del bench
        if "model" in parts:
            model(device, lambda: deadline.left("model"), result, small=small)
    except Broken as error:
        result.broken = str(error)


def write(folder: Path, result: Result) -> None:
    """gpu.json and gpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    held = result.as_json()
    (folder / "gpu.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    notes = [*held["failures"], *result.notes, *([result.broken] if result.broken else [])]
    page = markdown(held, rows=result.rows, model=result.model, notes=notes)
    (folder / "gpu.md").write_text(page, encoding="utf-8")


def read(folder: Path | None, fresh: Result) -> Result:
    """`fresh`, with what an earlier run on the same device and versions left in the folder."""
    file = None if folder is None else folder / "gpu.json"
    if file is None or not file.is_file():
        return fresh
    held = json.loads(file.read_text(encoding="utf-8"))
    same = ("device", "torch", "triton", "llmprune")
    if any(held["about"].get(name) != fresh.about.get(name) for name in same) or held["seed"] != fresh.seed:
        return fresh
    fresh.correctness = held["correctness"]
    fresh.tuned = [Tuned(**{**t, "case": Case(**t["case"])}) for t in held["tuned"]]
    fresh.rows = [_row(row) for row in held["rows"]]
    if held["model"] is not None:
        fresh.model = _model(held["model"])
    return fresh


def _row(held: dict[str, Any]) -> Row:
    case = Case(held["rows"], held["columns"], held["pattern"], held["tokens"])
    written = ("median", "ratio")
    return Row(case, [Measured(**{k: v for k, v in m.items() if k not in written}) for m in held["measured"]])


def _model(held: dict[str, Any]) -> ModelResult:
    modes = [gpu_model.Mode(**{k: v for k, v in mode.items() if k != "ratio"}) for mode in held["modes"]]
    rest = {k: v for k, v in held.items() if k not in ("memory_ratio", "modes", "sizes")}
    return ModelResult(**rest, sizes=gpu_model.Sizes(**held["sizes"]), modes=modes)


def show(result: Result, console: Console) -> None:
    """The table, the model, the goals, and what went wrong."""
    if result.correctness is not None and not result.correctness["passed"]:
        console.print(result.correctness["output"], markup=False)
    if result.rows:
        headings, *lines = table(result.rows)
        drawn = Table(*headings)
        for line in lines:
            drawn.add_row(*line)
        console.print(drawn)
    if result.model is not None:
        console.print("\n".join(model_lines(result.model)), markup=False)
    console.print("\n".join(map(str, goals(result.rows, result.model))), markup=False)
    for text in (*failures(result.rows, result.tuned), *result.notes):
        console.print(f"- {text}", markup=False)
    if result.broken is not None:
        console.print(f"The GPU stopped answering {result.broken}", markup=False)


@click.command(help="Are the kernels right on this GPU, and how fast? Words after -- go to pytest.")
@click.option("--only", multiple=True, type=click.Choice(PARTS), help="Run this part only.  [may be repeated]")
@click.option("--minutes", default=8.5, show_default=True, type=click.FloatRange(0, min_open=True), help="About.")
@click.option("--output", type=click.Path(path_type=Path), help="A folder for gpu.json and gpu.md.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of the table.")
@click.option("--small", is_flag=True, help="Tiny shapes and a tiny model: does it run? The numbers mean nothing.")
@click.option("--seed", default=0, show_default=True, help="Of all weights and inputs.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def main(
    *,
    only: Sequence[str],
    minutes: float,
    output: Path | None,
    as_json: bool,
    small: bool,
    seed: int,
    words: Sequence[str],
) -> None:
    """Run, print, write."""
    parts = [part for part in PARTS if part in (only or PARTS)]
    if not torch.cuda.is_available():
        click.echo("gpu_check needs a CUDA device, and torch sees none.", err=True)
        sys.exit(2)
    if "correctness" in parts and importlib.util.find_spec("pytest") is None:
        click.echo("The tests need pytest: install it, or choose other parts with --only.", err=True)
        sys.exit(2)
    device = Gpu()
    fresh = Result(about(device), os.environ.get("GPU_CHECK_COMMAND", "scripts/gpu_run.py"), seed)
    result = read(output, fresh)

    def save() -> None:
        if output is not None:
            write(output, result)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured is written all the same
    try:
        run(device, result, parts, minutes=minutes, small=small, words=words, save=save)
    finally:
        save()
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1))
    else:
        show(result, Console(highlight=False, width=None if sys.stdout.isatty() else WIDE))
    sys.exit(1 if result.wrong else 0)


if __name__ == "__main__":
    main()
