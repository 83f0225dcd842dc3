"""Zero-shot accuracy on the tasks that pruning papers report, by the lm-evaluation-harness (Gao et al., 2024,
https://github.com/EleutherAI/lm-evaluation-harness), called through its Python API on a model in memory.

    python -m llmprune.eval.zero_shot --model ./gpt2-alps-2of4 --tasks lambada,piqa --limit 200

The prompts, choices and metrics are the harness's own. The items come from the Hub, or from `--data FOLDER`: JSON
lines, either the rows of the data set that the harness would load, or rows of "query", "choices" and "gold".
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import UserError
from llmprune.eval.harness import answers, harness_of, with_items
from llmprune.eval.losses import LOGITS_MEMORY, evaluating
from llmprune.eval.tasks import TASKS, Items, check_tasks, task_files
from llmprune.eval.versions import versions
from llmprune.results import percent_with_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ZeroShot", "check_zero_shot", "main", "zero_shot"]


@dataclass(frozen=True)
class ZeroShot:
    """The accuracy on one task and all that is needed to compare it with another one."""

    task: str
    metric: str
    """acc, or acc_norm: answers ranked by log-likelihood per character."""
    value: float
    """Between 0 and 1."""
    standard_error: float | None
    """Items taken as independent; None for a single one."""
    items: int
    shots: int
    dtype: str
    seconds: float
    protocol: str
    """How it was measured, in one sentence."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the items came from."""
    versions: dict[str, str] = field(default_factory=dict)
    kind: str = "zero_shot"

    def __str__(self) -> str:
        return percent_with_error(self.value, self.standard_error)


def check_zero_shot(tasks: Sequence[str], data: Path | None = None, limit: int | None = None) -> None:
    """What can be known before a model is loaded.

    Raises
    ------
    UserError
        if lm-eval is not installed, a task is not known, the limit is no number of items, or `data` has no file for
        a task.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "zero-shot tasks are measured by the lm-evaluation-harness, which is not installed. "
            "Run: pip install 'llmprune[eval]'"
        )
    if limit is not None and limit < 1:
        raise UserError(f"a limit is a number of items of each task, 1 or more; got {limit}.")
    check_tasks(tasks, data)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    logits_memory: int = LOGITS_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ZeroShot, ...]:
    """Measure `model` on tasks of `llmprune.eval.tasks.TASKS`, one after the other.

    data : folder with the tasks' items; without it they come from the Hub, or its cache
    limit : the first so many items of each
    logits_memory : bounds the items per forward, at 256 tokens each
    progress : called with (answers done, answers in all), anew for every task

    Raises
    ------
    UserError
        as `check_zero_shot`, or if the items cannot be had.
    """
    check_zero_shot(tasks, data, limit)
    results = []
    with tempfile.TemporaryDirectory(prefix="llmprune-tasks-") as folder, evaluating(model):
        for task, items in task_files(tasks, data, Path(folder)):
            loaded, items = with_items(task, items)
            start = time.perf_counter()
            harness = harness_of(model, tokenizer, logits_memory=logits_memory, progress=progress)
            found = answers(harness, loaded, limit=limit)
            results.append(_row(found, task, items, model=model, limit=limit, seconds=time.perf_counter() - start))
    return tuple(results)


def _row(
    found: dict[str, Any], task: str, items: Items, *, model: PreTrainedModel, limit: int | None, seconds: float
) -> ZeroShot:
    [(name, scores)] = found["results"].items()
    metric = TASKS[task].metric
    error = scores[f"{metric}_stderr,none"]
    counted = found["n-samples"][name]
    packages = versions("lm_eval")
    dtype = str(model.dtype).removeprefix("torch.")
    some = "all" if limit is None else "the first"
    ways = (
        "answers ranked by log-likelihood per character" if metric == "acc_norm" else "answers ranked by log-likelihood"
    )
    return ZeroShot(
        task=task,
        metric=metric,
        value=float(scores[f"{metric},none"]),
        standard_error=float(error) if isinstance(error, float) and counted["effective"] > 1 else None,
        items=counted["effective"],
        shots=0,
        dtype=dtype,
        seconds=seconds,
        protocol=f"{task}: lm-eval {packages['lm_eval']}, task {name} version {found['versions'][name]}, "
        f"{some} {counted['effective']:,} of {counted['original']:,} items, zero-shot, no chat template; "
        f"{ways if task != 'lambada' else 'the last word is right if greedy writing gives it'}; {dtype} model.",
        provenance=items.provenance,
        versions=packages,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of this file: exit code 2 and one sentence where something given cannot be used."""
    from llmprune.eval.command import run_command, zero_shot_command

    run_command(zero_shot_command, argv, "python -m llmprune.eval.zero_shot")


if __name__ == "__main__":
    main()
