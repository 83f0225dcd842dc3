"""What gpu_check tells: one table, the goals as met or not met, and the same as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_model import Mode, ModelResult
from gpu_rows import GOAL_SHAPES, TORCH, Measured, Row, Tuned

__all__ = ["Goal", "failures", "goals", "markdown", "model_lines", "table"]

WAYS = (
    *("mma", "gemv", "expand+dot", "sell", "bitmap", "scratch+cuBLAS", "sell scratch+cuBLAS"),
    *("torch CUTLASS", "torch cuSPARSELt"),
)
"""Columns, in this order."""

HEADINGS = ("weight", "pattern", "tokens", "cuBLAS µs", "TB/s", "best of ours", *WAYS)

EXPLAINED = (
    "Microseconds are medians of one product in a CUDA graph, with weights rotated over three times the L2 cache and "
    "all candidates taking turns; × is how many times faster than cuBLAS in the same run. TB/s is how fast cuBLAS "
    "reads the dense weight."
)

LARGE, SQUARE = GOAL_SHAPES[:2], GOAL_SHAPES[2:]


@dataclass(frozen=True)
class Goal:
    """One line of what was aimed at.

    found : the worst case's number; None if nothing was measured
    where : which case that was, and how many of those that the goal is about were measured
    least : whether the goal is a least or a most
    """

    text: str
    goal: float
    found: float | None
    where: str
    least: bool = True

    @property
    def met(self) -> bool | None:
        """None: not measured."""
        if self.found is None:
            return None
        return self.found >= self.goal if self.least else self.found <= self.goal

    def __str__(self) -> str:
        told = {None: "not measured", True: "met", False: "not met"}[self.met]
        found = "" if self.found is None else f": {self.found:.2f}× ({self.where})"
        return f"{told:<13}{self.text} {'≥' if self.least else '≤'} {self.goal}×{found}"


def goals(rows: Sequence[Row], model: ModelResult | None) -> list[Goal]:
    """Those of an H100 in bfloat16, against cuBLAS in the same run; each is as good as its worst case."""
    few, any_pattern = (1, 4, 8, 16), ("2:4", "50%", "60%", "70%")
    wanted: list[tuple[str, float, Sequence[str], Sequence[tuple[int, int]], Sequence[int]]] = [
        ("2:4, 1-16 tokens, large", 1.5, ("2:4",), LARGE, few),
        ("2:4, 1-16 tokens, 4096x4096", 1.25, ("2:4",), SQUARE, few),
        ("2:4, 64 tokens, large", 1.2, ("2:4",), LARGE, (64,)),
        ("50 %, one token, large", 1.2, ("50%",), LARGE, (1,)),
        ("60 %, one token, large", 1.5, ("60%",), LARGE, (1,)),
        ("70 %, one token, large", 1.9, ("70%",), LARGE, (1,)),
        ("all patterns, 2048 tokens", 0.8, any_pattern, GOAL_SHAPES, (2048,)),
        ("all patterns, 16384 tokens", 0.95, any_pattern, GOAL_SHAPES, (16384,)),
    ]
    found = [
        _worst(text, goal, _chosen(rows, patterns, shapes, tokens), lambda row: row.ratio(row.best()))
        for text, goal, patterns, shapes, tokens in wanted
    ]
    ones = _chosen(rows, ("2:4",), GOAL_SHAPES, (1,))
    found.append(_worst("2:4 against torch's semi-structured, one token", 5.0, ones, _against_torch))
    mode, memory = (None, None) if model is None else (model.best, model.memory_ratio)
    where = "" if mode is None else f"{mode.name}, dense {statistics.median(mode.dense):.1f} tokens/s"
    found.append(Goal("model, decoding", 1.4, None if mode is None else mode.ratio, where))
    return [*found, Goal("model, memory", 0.62, memory, "sparse / dense", least=False)]


def _chosen(
    rows: Iterable[Row], patterns: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> list[Row]:
    def wanted(row: Row) -> bool:
        case = row.case
        return case.pattern in patterns and (case.rows, case.columns) in shapes and case.tokens in tokens

    return [row for row in rows if wanted(row)]


def _worst(text: str, goal: float, rows: Sequence[Row], number: Callable[[Row], float | None]) -> Goal:
    measured = [(ratio, row) for row in rows if (ratio := number(row)) is not None]
    if not measured:
        return Goal(text, goal, None, "")
    ratio, row = min(measured, key=lambda pair: pair[0])
    case = row.case
    where = f"{case.rows}x{case.columns} {case.pattern}, {case.tokens} tokens; worst of {len(measured)}"
    return Goal(text, goal, ratio, where)


def _against_torch(row: Row) -> float | None:
    """The faster of torch's products over the fastest of ours."""
    ours, theirs = row.best(), row.best(TORCH)
    return None if ours is None or theirs is None else theirs.median / ours.median


# The table ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Headings, then a line for each row: microseconds of cuBLAS, and how many times faster each candidate is."""
    return [HEADINGS, *(_line(row) for row in rows)]


def _line(row: Row) -> tuple[str, ...]:
    case, best = row.case, row.best()
    by_name = {m.way: m for m in row.measured}
    # bytes a microsecond are megabytes a second
    speed = 2 * case.rows * case.columns / row.dense * 1e-6 if math.isfinite(row.dense) else None
    told = "" if best is None else f"{best.median:,.1f} µs ({_ratio(row, best)})"
    return (
        f"{case.rows}x{case.columns}",
        case.pattern,
        str(case.tokens),
        f"{row.dense:,.1f}" if speed is not None else _ratio(row, by_name.get("cuBLAS")),
        "" if speed is None else f"{speed:.2f}",
        told,
        *(_ratio(row, by_name.get(name)) for name in WAYS),
    )


def _ratio(row: Row, measured: Measured | None) -> str:
    if measured is None:
        return ""
    if measured.wrong:
        return "WRONG"
    if measured.failure is not None:
        return "failed"
    ratio = row.ratio(measured)
    return "" if ratio is None else f"{ratio:.2f}×"


def model_lines(model: ModelResult) -> list[str]:
    """Tokens per second and memory of both."""
    lines = [f"A Llama of {model.sizes.layers} layers, {model.sizes.hidden}/{model.sizes.ffn}, one text at a time:"]
    lines += [f"  {mode.name:<9} {_mode(mode)}" for mode in model.modes]
    for name, dense, sparse in (
        ("tensors", model.dense_bytes, model.sparse_bytes),
        ("at most", model.dense_peak, model.sparse_peak),
    ):
        if dense and sparse:
            lines.append(f"  {name:<9} dense {dense / 1e9:.2f} GB, 2:4 {sparse / 1e9:.2f} GB: {sparse / dense:.3f}×")
    return lines


def _mode(mode: Mode) -> str:
    if mode.ratio is None:
        return f"failed: {mode.failure}"
    dense, sparse = statistics.median(mode.dense), statistics.median(mode.sparse)
    return (
        f"dense {dense:.1f} tokens/s, 2:4 {sparse:.1f} tokens/s: {mode.ratio:.2f}× "
        f"(the first {mode.same_tokens} tokens are the same)"
    )


def failures(rows: Sequence[Row], tuned: Sequence[Tuned]) -> list[str]:
    """What was not timed, and why; wrong results first."""
    found: dict[str, int] = {}
    for row in rows:
        for m in row.measured:
            if m.failure is not None:
                name = f"{m.way} {m.config}".strip()
                text = f"{name} at {row.case.rows}x{row.case.columns} {row.case.pattern}: {m.failure}"
                found[text] = found.get(text, 0) + 1
    for t in tuned:
        for config, reason in t.failures.items():
            text = f"{config} at {t.case.rows}x{t.case.columns} {t.case.pattern}, {t.case.tokens} tokens: {reason}"
            found[text] = found.get(text, 0) + 1
    return sorted(found, key=lambda text: ("wrong result" not in text, text))


def markdown(result: dict[str, Any], *, rows: Sequence[Row], model: ModelResult | None, notes: Sequence[str]) -> str:
    """The page: what ran, the goals, the table, the model. Nothing is in it that was not measured."""
    about = ", ".join(f"{name} {value}" for name, value in result["about"].items() if value)
    parts = [
        "# Kernels on a GPU",
        f"Written by `{result['command']}`, seed {result['seed']}.",
        f"{about}.",
        *([f"Tests: {result['correctness']['summary']}."] if result["correctness"] else []),
        EXPLAINED,
        "\n".join(f"- {line}" for line in map(str, goals(rows, model))),
    ]
    if rows:
        headings, *lines = table(rows)
        marks = ["|".join(["", *line, ""]) for line in (headings, ("---",) * len(headings), *lines)]
        parts.append("\n".join(marks))
    if model is not None:
        parts.append("\n".join(f"- {line.strip()}" for line in model_lines(model)))
    if notes:
        parts.append("Not measured:")
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"
