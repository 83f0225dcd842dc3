"""Settings of a run: frozen, checked when made, and the same flat names in Python, on the command line and in files.

`PruneConfig` holds everything that decides which weights become zero; `EvaluationConfig` what is measured before and
after. Both turn into plain dictionaries and back, which is how a checkpoint remembers how it was made.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from llmprune.errors import UserError
from llmprune.methods import METHODS, Method
from llmprune.sparsity.pattern import Pattern, parse_pattern

__all__ = ["EvaluationConfig", "PruneConfig", "from_mapping"]

T = TypeVar("T", bound="PruneConfig | EvaluationConfig")


@dataclass(frozen=True)
class PruneConfig:
    """What is pruned, how, and on which text.

    sparsity : "2:4" (N kept of every M), 0.5 or "50%"
    method : a name in `llmprune.methods.METHODS`
    block_size, dampening_frac : SparseGPT's
    ignore : weights to leave dense, by name, by last part of the name, or by regular expression after "re:"
    on_indivisible : "error" or "skip", for weights whose inputs do not divide into groups of M
    dataset, text_column : calibration text, see `llmprune.data`
    num_samples, seq_len : calibration windows and their length; seq_len None is min(2048, what the model can take)
    seed : chooses the windows
    batch_size : windows per forward
    bos : "auto", "always" or "never": whether a BOS token starts every window
    """

    sparsity: str = "2:4"
    method: str = "sparsegpt"
    block_size: int = 128
    dampening_frac: float = 0.01
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
        _one_of("method", self.method, METHODS)
        _one_of("on_indivisible", self.on_indivisible, ("error", "skip"))
        _one_of("bos", self.bos, ("auto", "always", "never"))
        _at_least("num_samples", self.num_samples, 1)
        _at_least("seq_len", self.seq_len, 2, optional=True)
        _at_least("seed", self.seed, 0)
        _at_least("batch_size", self.batch_size, 1)
        for entry in self.ignore:
            if entry.startswith("re:"):
                _compiles(entry)
        self.build_method()

    @property
    def pattern(self) -> Pattern:
        """The sparsity, parsed."""
        return parse_pattern(self.sparsity)

    def build_method(self) -> Method:
        """The method with those of these settings that it has."""
        kind = METHODS[self.method]
        known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: value for name, value in asdict(self).items() if name in known})

    @property
    def name_suffix(self) -> str:
        """How a checkpoint pruned like this is named: `{base}-sparsegpt-2of4`."""
        return f"{self.method}-{self.pattern.slug}"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured before and after.

    eval_dataset : data sets for perplexity, see `llmprune.data`; none: no evaluation
    eval_tokens : at most so many tokens of each; None: all of them on a GPU, 16 384 on a CPU
    eval_seq_len : length of a window; None: as the calibration windows
    """

    eval_dataset: tuple[str, ...] = field(default=("wikitext2",))
    eval_tokens: int | None = None
    eval_seq_len: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_dataset", _names(self.eval_dataset))
        _at_least("eval_tokens", self.eval_tokens, 2, optional=True)
        _at_least("eval_seq_len", self.eval_seq_len, 2, optional=True)


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


def _one_of(name: str, value: str, allowed: Any) -> None:
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


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    """A single name stands for a list of one: without this it would become a list of its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def _compiles(entry: str) -> None:
    try:
        re.compile(entry[3:])
    except re.error as error:
        raise UserError(f"ignore: {entry[3:]!r} is no regular expression ({error}).") from None
