"""The whole job, from a model's name to a verified checkpoint: what the command line and `llmprune.prune()` both call.

Order: everything that can fail early fails before the work (names, output, access to the Hub, texts, configurations);
then dense evaluation, pruning, saving with proof, and last the evaluation of what was saved, so that hours of pruning
are on disk before anything else can go wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.config import EvaluationConfig, PruneConfig, from_mapping
from llmprune.job.request import Job, Observer, PruneResult
from llmprune.job.stages import run
from llmprune.job.stop import Stop, Stopped, stoppable

__all__ = ["Job", "Observer", "PruneResult", "Stop", "Stopped", "prune", "run", "stoppable"]


def prune(
    model: Any,
    *,
    dataset: Any = "c4",
    tokenizer: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    eval_dataset: Sequence[str] = (),
    observer: Observer | None = None,
    **settings: Any,
) -> PruneResult:
    """Prune a language model: `prune("gpt2", sparsity="2:4")`.

    Parameters
    ----------
    model : hub id, directory, `.gguf` file, or a transformers causal language model, which is pruned in place
    dataset : calibration text: a name that `llmprune.data` knows, a list of strings, a `datasets.Dataset`, or token
        ids (num_samples, seq_len)
    tokenizer : needed where `model` is in memory, unless `dataset` is token ids
    output_dir : save and verify the result there; without it nothing is written
    eval_dataset : measure perplexity on these before and after
    settings : any field of `PruneConfig`, `EvaluationConfig` or `Job` (sparsity, method, num_samples, device, …)

    Raises
    ------
    LlmpruneError
        see `llmprune.errors`; a model in memory may be partly pruned after a NumericError.
    """
    given = dict(settings)
    config, evaluation, rest = _split(settings)
    dataset = os.fspath(dataset) if isinstance(dataset, os.PathLike) else dataset
    name = dataset if isinstance(dataset, str) else type(dataset).__name__
    return run(
        Job(
            model,
            config=from_mapping(PruneConfig, {**config, "dataset": name}),
            evaluation=from_mapping(EvaluationConfig, {**evaluation, "eval_dataset": eval_dataset}),
            dataset=dataset,
            tokenizer=tokenizer,
            output_dir=Path(output_dir) if output_dir is not None else None,
            command=_called(model, {"dataset": dataset, "eval_dataset": eval_dataset or None, **given}),
            **rest,
        ),
        observer,
    )


LONGEST_LIST = 200
"""Characters of a list that is told in full: longer ones are texts."""


def _called(model: Any, settings: Mapping[str, Any]) -> str:
    """The call as the report tells of it: the program around it, and what its own command line held, are not ours to
    publish. Of a path its last part is told; of an object, and of a list that is no list of a few names, its type."""

    def told(value: Any) -> str:
        if isinstance(value, str | os.PathLike):
            path = Path(os.fspath(value))
            return repr(path.name if path.is_absolute() else os.fspath(value))
        if isinstance(value, tuple | list) and len(repr(value)) <= LONGEST_LIST:
            return f"[{', '.join(map(told, value))}]"
        return repr(value) if isinstance(value, bool | int | float) else type(value).__name__

    settled = {name: value for name, value in settings.items() if value is not None}
    words = [told(model), *(f"{name}={told(value)}" for name, value in settled.items())]
    return f"llmprune.prune({', '.join(words)})"


def _split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    evaluation: dict[str, Any] = {}
    for name in ("eval_tokens", "eval_seq_len", "eval_tasks", "eval_data", "eval_limit"):
        if name in settings:
            evaluation[name] = settings.pop(name)
    given = {"model", "config", "evaluation", "dataset", "tokenizer", "output_dir", "command"}
    own = set(Job.__dataclass_fields__) - given
    rest = {name: settings.pop(name) for name in own & set(settings)}
    return settings, evaluation, rest
