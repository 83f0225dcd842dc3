"""What gpu_check measures: the plan of a run, and what comes out of it as plain rows. No GPU is needed here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from kernel_benchmarks import Case

__all__ = [
    "DENSE",
    "OURS",
    "TORCH",
    "Measured",
    "Plan",
    "Row",
    "Tuned",
    "copied_bytes",
    "copies_for",
    "kind",
    "made_plan",
    "memory_needed",
    "nearest",
]

DENSE, OURS, TORCH = "dense", "ours", "torch"
"""The roles of a candidate: what all are divided by, our kernels, and torch's own sparse products."""

GOAL_SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
"""Of an 8B Llama: gate and up, down, query and output. Goals are set for these, so they come first."""

MORE_SHAPES = ((6144, 4096), (28672, 4096))
"""Query, key and value as one matrix; gate and up as one."""

MODEL_ONLY = (1024, 4096)
"""Key and value by themselves: tuned for the model, not in the table."""

PATTERNS = ("2:4", "50%", "60%", "70%")
TOKENS = (1, 4, 8, 16, 64, 256, 2048, 16384)

TUNED_TOKENS = {"2:4": (1, 8, 16, 64), "50%": (1, 8, 64), "70%": (1,)}
"""What is tuned; all other cases take the settings of the nearest."""

SMALL_SHAPES, SMALL_TOKENS = ((256, 512), (512, 256), (256, 256)), (1, 16, 256)
"""For a try on any machine; the numbers mean nothing."""

MOST_COPIES = 50
"""Of a weight so small that its time is the overhead of a launch anyway."""

SAMPLED = 128
"""Products of more tokens are checked on so many of them."""


@dataclass(frozen=True)
class Plan:
    """Cases in the order in which they are done: whatever the time does not suffice for comes last."""

    tune: tuple[Case, ...]
    measure: tuple[Case, ...]


@dataclass
class Tuned:
    """The best settings of one candidate for one case.

    config, microseconds : of the best; none if all failed
    default, default_microseconds : what is used untimed; None if it failed
    tried, listed : how many were timed, of how many that could be
    failures : by config, why it was not timed: an error that it raised, or a wrong result
    """

    case: Case
    way: str
    config: str = ""
    microseconds: float | None = None
    default: str = ""
    default_microseconds: float | None = None
    tried: int = 0
    listed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)


@dataclass
class Measured:
    """One candidate in one case: microseconds of a product in each round, or why there are none.

    wrong : whether it computed something else
    """

    way: str
    role: str
    config: str = ""
    error: float = 0.0
    failure: str | None = None
    wrong: bool = False
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Microseconds; infinite where nothing was timed."""
        return statistics.median(self.rounds) if self.rounds else math.inf


@dataclass
class Row:
    """All candidates in one case."""

    case: Case
    measured: list[Measured]

    @property
    def dense(self) -> float:
        """Microseconds of cuBLAS."""
        return min((m.median for m in self.measured if m.role == DENSE), default=math.inf)

    def best(self, role: str = OURS) -> Measured | None:
        """The fastest candidate of a role; None if none was timed."""
        timed = [m for m in self.measured if m.role == role and m.rounds]
        return min(timed, key=lambda m: m.median, default=None)

    def ratio(self, measured: Measured | None) -> float | None:
        """How many times faster than cuBLAS; None if either was not timed."""
        if measured is None or not measured.rounds or not math.isfinite(self.dense):
            return None
        return self.dense / measured.median

    def as_json(self) -> dict[str, Any]:
        """With medians and ratios written out."""
        cells = [{**asdict(m), "median": m.median if m.rounds else None, "ratio": self.ratio(m)} for m in self.measured]
        return {**asdict(self.case), "measured": cells}


def made_plan(*, small: bool = False) -> Plan:
    """What a run does. Shapes with goals come first, and all cases of one weight stand together."""
    goal_shapes, more_shapes = (SMALL_SHAPES, ()) if small else (GOAL_SHAPES, MORE_SHAPES)
    numbers = SMALL_TOKENS if small else TOKENS
    measure = [
        Case(*shape, pattern, tokens)
        for shapes in (goal_shapes, more_shapes)
        for pattern in PATTERNS
        for shape in shapes
        for tokens in numbers
    ]
    tune = [
        Case(*shape, pattern, tokens)
        for shapes in (goal_shapes, more_shapes)
        for pattern, counts in TUNED_TOKENS.items()
        for shape in shapes
        for tokens in counts
    ]
    if not small:
        tune.insert(0, Case(*MODEL_ONLY, "2:4", 1))
    return Plan(tuple(tune), tuple(measure))


def kind(pattern: str) -> str:
    """Which kernels take it: "2:4" or "any"."""
    return pattern if ":" in pattern else "any"


def nearest(case: Case, tuned: Iterable[Tuned], way: str) -> list[str]:
    """Settings of this candidate that were best for the same shape and kind of pattern, the most similar case first."""
    alike = [
        t
        for t in tuned
        if t.way == way and t.config and _shape(t.case) == _shape(case) and kind(t.case.pattern) == kind(case.pattern)
    ]

    def distance(t: Tuned) -> tuple[float, bool]:
        return abs(math.log2(t.case.tokens) - math.log2(case.tokens)), t.case.pattern != case.pattern

    return [t.config for t in sorted(alike, key=distance)]


def _shape(case: Case) -> tuple[int, int]:
    return case.rows, case.columns


def copies_for(nbytes: int, cache: int) -> int:
    """So many copies of a weight exceed the cache three times over; two at least, and 50 of a tiny one."""
    return min(MOST_COPIES, max(2, math.ceil(3 * cache / max(1, nbytes))))


def copied_bytes(case: Case, cache: int) -> int:
    """Bytes of all dense copies. Every sparse form has about as many: smaller ones come in more copies."""
    dense = 2 * case.rows * case.columns
    return dense * copies_for(dense, cache)


def memory_needed(case: Case, cache: int) -> int:
    """Bytes on the device, at most: the weight in float64 for the check, five forms in copies, inputs and outputs."""
    entries = case.rows * case.columns
    inputs, outputs = case.tokens * case.columns, case.tokens * case.rows
    return 10 * entries + 5 * copied_bytes(case, cache) + 2 * inputs + 4 * outputs + 2**30
