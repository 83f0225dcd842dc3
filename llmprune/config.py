"""Settings of a run: frozen, checked when made, and the same flat names in Python, on the command line and in files.

`PruneConfig` holds everything that decides which weights become zero; `EvaluationConfig` what is measured before and
after. Both turn into plain dictionaries and back, which is how a checkpoint remembers how it was made.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from llmprune.errors import UserError
from llmprune.methods import METHODS, Method
from llmprune.recipe import Recipe
from llmprune.sparsity.allocation import Allocation, parse_level
from llmprune.sparsity.pattern import NM, Pattern, parse_pattern

__all__ = ["EFFORTS", "EvaluationConfig", "PruneConfig", "asked_for", "from_mapping"]

NO_STEPS: dict[str, Any] = {
    "permute": False,
    "dense_targets": False,
    "polish": 0,
    "refit": 0,
    "tune": 0,
    "distill": 0,
    "allocation": "uniform",
    "dampening_frac": 0.01,
}
"""A method as its paper has it."""

EFFORTS: dict[str, dict[str, Any]] = {
    "fast": NO_STEPS | {"method": "alps", "admm_steps": 0, "refit": 3},
    "balanced": NO_STEPS | {"method": "alps", "permute": True, "dense_targets": True, "dampening_frac": 0.05},
    "best": NO_STEPS
    | {
        "method": "alps",
        "permute": True,
        "dense_targets": True,
        "distill": 3,
        "allocation": "error",
        "dampening_frac": 0.05,
    },
}
"""What each effort does; what each costs and brings stands in the README's table."""

DEFAULT_EFFORT = "balanced"

MOST_CHOICES = 1000
"""Polishing holds an inverse for each group of a weight and each choice in it, and judges all choices at once."""

T = TypeVar("T", bound="PruneConfig | EvaluationConfig")


@dataclass(frozen=True)
class PruneConfig:
    """What is pruned, how, and on which text.

    sparsity : "2:4" (N kept of every M), 0.5 or "50%"
    effort : a name in `EFFORTS`, which sets the steps that follow; "balanced" if no method is given
    method : a name in `llmprune.methods.METHODS`: that method as its paper has it, and the steps that are asked for
    permute : for N:M, let neurons and value dimensions change places first, so that the pattern keeps more
    dense_targets : aim at the outputs that the dense model would give on its own inputs
    polish : for N:M, sweeps in which every group may choose again what it keeps, 0 for none
    refit : conjugate-gradient steps on the mask, in place of those that the method has; 0: as the method has it
    tune : passes over the calibration windows to tune each half of a layer with its masks fixed, 0 for none
    distill : passes over the calibration windows to tune all layers together towards the dense model's predictions,
        masks fixed, 0 for none; needs five times the model's float32 size in memory
    allocation : where the zeros go: "uniform", "owl" or "error", see `llmprune.sparsity.allocation`
    budget, levels : for N:M and allocation "error" (which effort "best" has once there is a budget): the fraction of
        zeros in all, and what a weight may get besides `sparsity` ("dense", "6:8", …)
    overrides : "ENTRY=PATTERN" or "ENTRY=dense" for single weights (or a dict): an entry is what `ignore` takes, or
        with a dot at its end all that lies inside ("layers.0.")
    block_size, admm_steps : SparseGPT's, ALPS'; None as the method has them
    dampening_frac : added to the diagonal of a Hessian, as a fraction of its mean
    ignore : weights to leave dense, by name, by last part of the name, or by regular expression after "re:"
    on_indivisible : "error" or "skip", for weights whose inputs do not divide into groups of M
    dataset, text_column : calibration text, see `llmprune.data`
    num_samples, seq_len : calibration windows and their length; seq_len None is min(2048, what the model can take)
    seed : chooses the windows
    batch_size : windows per forward
    bos : "auto", "always" or "never": whether a BOS token starts every window
    """

    sparsity: str = "2:4"
    effort: str | None = None
    method: str | None = None
    permute: bool | None = None
    dense_targets: bool | None = None
    polish: int | None = None
    refit: int | None = None
    tune: int | None = None
    distill: int | None = None
    allocation: str | None = None
    budget: float | None = None
    levels: tuple[str, ...] = ("dense",)
    overrides: tuple[str, ...] = ()
    block_size: int | None = None
    admm_steps: int | None = None
    dampening_frac: float | None = None
    ignore: tuple[str, ...] = ()
    on_indivisible: str = "error"
    dataset: str = "c4"
    text_column: str | None = None
    num_samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    batch_size: int = 1
    bos: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", str(parse_pattern(self.sparsity)))
        object.__setattr__(self, "ignore", _names(self.ignore))
        object.__setattr__(self, "levels", _names(self.levels))
        object.__setattr__(self, "overrides", _pairs(self.overrides))
        self._settle_steps()
        _one_of("method", self.method, METHODS)
        _fraction("dampening_frac", self.dampening_frac)
        _at_least("block_size", self.block_size, 1, optional=True)
        _at_least("admm_steps", self.admm_steps, 0, optional=True)
        _at_least("polish", self.polish, 0)
        _at_least("refit", self.refit, 0)
        _at_least("tune", self.tune, 0)
        _at_least("distill", self.distill, 0)
        _one_of("on_indivisible", self.on_indivisible, ("error", "skip"))
        _one_of("bos", self.bos, ("auto", "always", "never"))
        _at_least("num_samples", self.num_samples, 1)
        _at_least("seq_len", self.seq_len, 2, optional=True)
        _at_least("seed", self.seed, 0)
        _at_least("batch_size", self.batch_size, 1)
        _compile("ignore", self.ignore)
        _compile("overrides", self.override_map)
        self.build_method()
        self._check_dampening()
        levels = [*self.build_allocation().levels, *map(parse_level, self.override_map.values())]
        if self.polish:
            _check_choices([self.pattern, *levels])

    def _settle_steps(self) -> None:
        """Fill in what was not said: the effort's steps, or none besides the method."""
        if self.effort is None and self.method is None:
            object.__setattr__(self, "effort", DEFAULT_EFFORT)
        if self.effort is not None:
            _one_of("effort", self.effort, EFFORTS)
        steps = EFFORTS[self.effort] if self.effort is not None else NO_STEPS
        if self.effort is not None and self.method not in (None, steps["method"]):
            raise UserError(
                f"effort {self.effort!r} chooses the method itself ({steps['method']}); got method {self.method!r} "
                "too. Give one of the two."
            )
        for name, value in steps.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, NO_STEPS.get(name) if name in self._without_meaning else value)
        for name in ("permute", "polish"):
            if getattr(self, name) and not isinstance(self.pattern, NM):
                raise UserError(
                    f"{name} is about the groups of N:M; a sparsity of {self.sparsity} has no groups. "
                    "Leave it out, or give an N:M sparsity such as 2:4."
                )

    def _check_dampening(self) -> None:
        """What was filled in does no harm, and must not be refused when a config comes back from a file."""
        damped = "dampening_frac" in _settings_of(str(self.method)) or self.refit or self.polish
        if not damped and self.dampening_frac != NO_STEPS["dampening_frac"]:
            raise UserError(
                f"dampening_frac is added to a Hessian that is solved with, which method {self.method} does not do. "
                "Leave it out, or give refit."
            )

    @property
    def _without_meaning(self) -> tuple[str, ...]:
        """Steps of an effort that do nothing here: N:M has the same share of zeros everywhere unless a budget is
        given, and without groups there is no order and no choice of a group."""
        if isinstance(self.pattern, NM):
            return ("allocation",) if self.budget is None else ()
        return ("permute", "polish")

    @property
    def pattern(self) -> Pattern:
        """The sparsity, parsed."""
        return parse_pattern(self.sparsity)

    def build_method(self) -> Method:
        """The method with those of these settings that it has."""
        known = _settings_of(str(self.method))
        for name in ("block_size", "admm_steps"):
            if getattr(self, name) is not None and name not in known:
                raise UserError(f"{name} is a setting that method {self.method} does not have. Leave it out.")
        settings = {name: value for name, value in asdict(self).items() if name in known and value is not None}
        if self.refit and "refit_steps" in known:
            settings["refit_steps"] = self.refit
        return METHODS[str(self.method)](**settings)

    def build_allocation(self) -> Allocation:
        """Where the zeros go."""
        levels = tuple(parse_level(level) for level in self.levels)
        return Allocation(self.pattern, str(self.allocation), self.budget, levels)

    @property
    def override_map(self) -> dict[str, str]:
        """Entry → pattern or "dense"."""
        return dict(pair.rsplit("=", 1) for pair in self.overrides)

    @property
    def recipe(self) -> Recipe:
        """The method and the steps around it."""
        assert self.polish is not None
        assert self.refit is not None
        assert self.dampening_frac is not None
        method = self.build_method()
        return Recipe(
            method,
            bool(self.dense_targets),
            self.polish,
            0 if hasattr(method, "refit_steps") else self.refit,
            self.dampening_frac,
            hold_out=bool(self.tune or self.distill),
        )

    @property
    def name_suffix(self) -> str:
        """How a checkpoint pruned like this is named: `{base}-sparsegpt-2of4`."""
        return f"{self.method}-{self.pattern.slug}"


def asked_for(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier run without those that its effort or method made, which another effort, method or
    pattern beside them makes otherwise."""
    chosen = "method" if settings.get("effort") is None else "effort"
    if settings.get(chosen) is None or "sparsity" not in settings:
        return settings
    made = asdict(PruneConfig(sparsity=settings["sparsity"], **{chosen: settings[chosen]}))
    kept = ("sparsity", chosen)
    return {name: value for name, value in settings.items() if name in kept or _plain(made.get(name)) != _plain(value)}


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured before and after.

    eval_dataset : data sets for perplexity, see `llmprune.data`; none: no evaluation
    eval_tokens : at most so many tokens of each; None: all of them on a GPU, 16 384 on a CPU
    eval_seq_len : length of a window; None: as the calibration windows
    eval_tasks : zero-shot tasks, see `llmprune.eval.tasks`
    eval_data : folder with the items of the tasks; None: they come from the Hub
    eval_limit : at most so many items of each task; None: all
    """

    eval_dataset: tuple[str, ...] = field(default=("wikitext2",))
    eval_tokens: int | None = None
    eval_seq_len: int | None = None
    eval_tasks: tuple[str, ...] = ()
    eval_data: str | None = None
    eval_limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_dataset", _names(self.eval_dataset))
        _at_least("eval_tokens", self.eval_tokens, 2, optional=True)
        _at_least("eval_seq_len", self.eval_seq_len, 2, optional=True)
        tasks = ",".join(_names(self.eval_tasks))  # "lambada,piqa" is how people write them elsewhere
        object.__setattr__(self, "eval_tasks", tuple(filter(None, tasks.split(","))))
        _at_least("eval_limit", self.eval_limit, 1, optional=True)

    @property
    def asks_for_something(self) -> bool:
        """Whether anything is to be measured."""
        return bool(self.eval_dataset or self.eval_tasks)

    @property
    def task_data(self) -> Path | None:
        """The folder of `eval_data`."""
        return None if self.eval_data is None else Path(self.eval_data)


def from_mapping(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make a config from plain data; a name that it does not have is a UserError that lists the near ones."""
    known = [f.name for f in fields(kind)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UserError(
                f"{kind.__name__} has no setting {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} "
                f"It has: {', '.join(known)}."
            )
    return kind(**values)


def _one_of(name: str, value: str | None, allowed: Any) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), 1)
        raise UserError(
            f"{name} is one of {', '.join(allowed)}; got {value!r}{f' (did you mean {near[0]!r}?)' if near else ''}."
        )


def _at_least(name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} is a whole number, at least {least}; got {value!r}.")


def _fraction(name: str, value: float | None) -> None:
    if not isinstance(value, float) or not 0 < value < 1:
        raise UserError(
            f"{name} is a fraction of the Hessian's mean diagonal, between 0 and 1, usually 0.01; got {value!r}."
        )


def _check_choices(patterns: Iterable[Pattern | None]) -> None:
    for pattern in patterns:
        if isinstance(pattern, NM) and (ways := math.comb(pattern.m, pattern.n)) > MOST_CHOICES:
            raise UserError(
                f"polish tries every way to keep {pattern.n} of {pattern.m}, for patterns with at most "
                f"{MOST_CHOICES:,} (2:4 has 6, 4:8 has 70); {pattern} has {ways:,}. Leave it out."
            )


def _settings_of(method: str) -> set[str]:
    return {f.name for f in fields(METHODS[method])}  # type: ignore[arg-type]


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    """A single name stands for a list of one: without this it would become a list of its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def _pairs(given: Mapping[str, str] | str | Iterable[str]) -> tuple[str, ...]:
    pairs = tuple(f"{entry}={value}" for entry, value in given.items()) if isinstance(given, Mapping) else _names(given)
    for pair in pairs:
        if "=" not in pair:
            raise UserError(
                f"overrides are written ENTRY=PATTERN, such as down_proj=4:8 or layers.0.=dense; got {pair!r}."
            )
    return pairs


def _compile(name: str, entries: Iterable[str]) -> None:
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise UserError(f"{name}: {entry[3:]!r} is no regular expression ({error}).") from None
