"""The lm-evaluation-harness, called through its Python API: a model as it wants it, and tasks with their items read.

It talks a lot (three bars a task, notes, settings in the environment); here it is kept quiet, and says by a function
how far it is.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

from llmprune.data.hub import dataset_commit
from llmprune.errors import UserError
from llmprune.eval.tasks import Items
from llmprune.model import quiet_transformers

__all__ = ["answers", "harness_of", "with_items"]

_TOKENS_OF_AN_ITEM = 256  # a question with one of its answers; few are longer
_MOST_ITEMS_AT_ONCE = 64


def with_items(task: str, items: Items) -> tuple[dict[str, Any], Items]:
    """The harness's task with its items read, and where they came from; for those of the Hub, the commit too.

    Raises
    ------
    UserError
        if they cannot be had.
    """
    with _quiet():
        _import_harness()
    from lm_eval.tasks import TaskManager

    try:
        with _quiet(bars=True):
            # With the defaults, its index of all tasks takes most of a minute.
            loaded: dict[str, Any] = TaskManager(include_defaults=False).load(str(items.config))
    except Exception as error:  # whatever `datasets` and the Hub raise for data that cannot be had
        where = "from the Hub" if items.file is None else f"from {items.file}"
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"the items of {task} cannot be read {where}: {said}; give a folder with them as JSON lines (--data, in a "
            "pruning run --eval-data)."
        ) from error
    if items.file is not None:
        return loaded, items
    [found] = loaded["tasks"].values()
    split = found.config.test_split or found.config.validation_split
    origin = {"repo": found.DATASET_PATH, "config": found.DATASET_NAME, "split": split}
    return loaded, replace(items, provenance={**origin, "revision": dataset_commit(found.dataset[split])})


def harness_of(
    model: Any, tokenizer: Any, *, logits_memory: int, progress: Callable[[int, int], None] | None = None
) -> Any:
    """The model as lm-eval wants it. Arguments as in `llmprune.eval.zero_shot.zero_shot`."""
    import torch
    from lm_eval.models.huggingface import HFLM

    per_item = 4 * _TOKENS_OF_AN_ITEM * int(model.config.get_text_config().vocab_size)
    batch = max(1, min(_MOST_ITEMS_AT_ONCE, logits_memory // per_item))
    with _quiet():
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, softmax_dtype=torch.float32
        )
    if progress is not None:
        _count(harness, progress)
    return harness


def answers(harness: Any, loaded: dict[str, Any], *, limit: int | None) -> dict[str, Any]:
    """What lm-eval returns for one task."""
    from lm_eval import evaluate

    with _quiet():
        # Not `simple_evaluate`, which sets the seeds of the whole process and asks git about the current folder.
        found: dict[str, Any] = evaluate(harness, loaded, limit=limit, log_samples=False)
    return found


def _count(harness: Any, progress: Callable[[int, int], None]) -> None:
    """Let the harness tell how far it is. Its own bars are three a task, and break those of others."""
    answer, forward = harness._loglikelihood_tokens, harness._model_call

    def answered(requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        done = 0

        def forwarded(inputs: Any, *rest: Any, **named: Any) -> Any:
            nonlocal done
            logits = forward(inputs, *rest, **named)
            done = min(done + len(inputs), len(requests) - 1)  # answers that share a forward count as one
            progress(done, len(requests))
            return logits

        harness._model_call = forwarded
        found = answer(requests, *args, **kwargs)
        progress(len(requests), len(requests))
        return found

    harness._loglikelihood_tokens = answered


def _import_harness() -> None:
    """Bring in what takes seconds to import and is no part of the measurement.

    It sets variables that make the Hub's clients faster and ask for much memory; a later push has its own.
    """
    before = set(os.environ)
    import lm_eval.models.huggingface
    import lm_eval.tasks  # noqa: F401

    for name in set(os.environ) - before:
        if name.startswith("HF_"):
            del os.environ[name]


@contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep the notes and bars of the harness and of transformers off the screen; `bars` lets bars onto a terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not (bars and sys.stderr.isatty()):
            stack.enter_context(redirect_stderr(io.StringIO()))
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
