"""Everything that is measured of a model, and of others beside the dense one: perplexity, divergence, tasks, text.

The dense model comes first and leaves behind what the others need to be compared with it, so that only one model has
to be in memory at a time, and in a job, where the model is pruned in place, none is loaded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune.data import BosMode, Corpus
from llmprune.eval.divergence import DensePass
from llmprune.eval.generation import Continuation, Generation, continuations, side_by_side
from llmprune.eval.losses import LOGITS_MEMORY
from llmprune.eval.perplexity import Perplexity, evaluate
from llmprune.eval.zero_shot import ZeroShot, zero_shot

__all__ = ["Measured", "Measures", "Wanted"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What to measure. `tokens`, `seq_len`, `bos` and `batch_size` as in `llmprune.eval.perplexity.evaluate`.

    corpora : texts for perplexity; none: no perplexity, no divergence and no generations
    generations : whether the models also write, which takes a forward for every token
    tasks, data, limit : as in `llmprune.eval.zero_shot.zero_shot`
    """

    corpora: Sequence[Corpus] = ()
    tokens: int | None = None
    seq_len: int | None = None
    bos: BosMode = "auto"
    batch_size: int | None = None
    generations: bool = True
    logits_memory: int = LOGITS_MEMORY
    tasks: Sequence[str] = ()
    data: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Measured:
    """What was found out about one model.

    rows : first the perplexities, then the tasks, in the order in which they were asked for
    generations : beside the dense model's
    notes : what could not be measured, and why
    """

    rows: tuple[Perplexity | ZeroShot, ...]
    generations: tuple[Generation, ...] = ()
    notes: tuple[str, ...] = ()

    def plain_rows(self) -> tuple[dict[str, Any], ...]:
        """The rows as plain data."""
        return tuple(asdict(row) for row in self.rows)

    def plain_generations(self) -> tuple[dict[str, Any], ...]:
        """The generations as plain data."""
        return tuple(asdict(generation) for generation in self.generations)


class Measures:
    """The measurements of one dense model and any number of others, which are measured `against` it."""

    def __init__(self, wanted: Wanted, progress: Progress | None = None) -> None:
        self.wanted = wanted
        self._progress = progress
        self._dense: list[DensePass] = []
        self._written: tuple[Continuation, ...] = ()

    def alone(self, model: Any, tokenizer: Any) -> Measured:
        """A model that is compared with no other one."""
        return Measured((*self._perplexities(model, tokenizer), *self._tasks(model, tokenizer)))

    def dense(self, model: Any, tokenizer: Any) -> Measured:
        """The dense model, of which is kept what `against` needs."""
        self._dense = [DensePass(self.wanted.logits_memory) for _ in self.wanted.corpora]
        perplexities = self._perplexities(model, tokenizer, record=self._dense)
        self._written = self._continuations(model, tokenizer)
        return Measured((*perplexities, *self._tasks(model, tokenizer)))

    def against(self, model: Any, tokenizer: Any) -> Measured:
        """Another model, or what the dense one has become, after `dense`."""
        perplexities = self._perplexities(model, tokenizer, against=self._dense)
        generations = side_by_side(self._written, self._continuations(model, tokenizer)) if self._written else ()
        troubles = dict.fromkeys(dense.trouble for dense in self._dense if dense.trouble is not None)
        notes = tuple(f"the divergence from the dense model was not measured: {trouble}" for trouble in troubles)
        return Measured((*perplexities, *self._tasks(model, tokenizer)), generations, notes)

    def _perplexities(
        self,
        model: Any,
        tokenizer: Any,
        *,
        record: Sequence[DensePass] | None = None,
        against: Sequence[DensePass] | None = None,
    ) -> tuple[Perplexity, ...]:
        wanted = self.wanted
        return tuple(
            evaluate(
                model,
                tokenizer,
                corpus,
                tokens=wanted.tokens,
                seq_len=wanted.seq_len,
                bos=wanted.bos,
                batch_size=wanted.batch_size,
                logits_memory=wanted.logits_memory,
                record=record[index] if record is not None else None,
                against=against[index] if against is not None else None,
                progress=self._progress,
            )
            for index, corpus in enumerate(wanted.corpora)
        )

    def _continuations(self, model: Any, tokenizer: Any) -> tuple[Continuation, ...]:
        return continuations(model, tokenizer) if self.wanted.corpora and self.wanted.generations else ()

    def _tasks(self, model: Any, tokenizer: Any) -> tuple[ZeroShot, ...]:
        wanted = self.wanted
        return zero_shot(
            model,
            tokenizer,
            wanted.tasks,
            data=wanted.data,
            limit=wanted.limit,
            logits_memory=wanted.logits_memory,
            progress=self._progress,
        )
