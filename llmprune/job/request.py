"""What is asked for, who watches, and what comes back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmprune.checkpoint.report import Report
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.errors import UserError
from llmprune.pipeline import Watcher

__all__ = ["Job", "Observer", "PruneResult"]


@dataclass(frozen=True)
class Job:
    """Everything that the command line can say, beside the two configs.

    model : hub id, directory, `.gguf` file, `demo`, or a transformers model in memory (which needs `tokenizer`)
    output_dir : where the checkpoint goes; None: it is not saved
    command : what the report tells as the command; None: the command line of this process
    format : "dense", zeros stored as any number, which everything reads; or "packed", without them
    push_to_hub : repository id, "" for the default name in one's own namespace, None: no push
    hub_private_repo, hub_revision, hub_create_pr : as in `llmprune.checkpoint.hub.Destination`
    low_memory : leave the weights on disk, and bring them into memory one decoder layer at a time; None: if the model
        does not fit
    activations_dir : where hidden states go, into mapped files, in place of memory
    resume : "auto" goes on from the safe points of an earlier run of the same job; "never" removes them
    safe_points : seconds between two safe points at least, for a model in memory
    """

    model: Any
    config: PruneConfig = field(default_factory=PruneConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dataset: Any = None
    tokenizer: Any = None
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    output_dir: Path | None = None
    command: str | None = None
    default_output: bool = False
    overwrite: bool = False
    max_shard_size: str = "5GB"
    format: str = "dense"
    push_to_hub: str | None = None
    hub_private_repo: bool = False
    hub_revision: str | None = None
    hub_create_pr: bool = False
    low_memory: bool | None = None
    activations_dir: Path | None = None
    resume: str = "auto"
    safe_points: float = 60.0

    def __post_init__(self) -> None:
        size = str(self.max_shard_size)
        if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", size, re.IGNORECASE) or not float(size[:-2]):
            raise UserError(f"--max-shard-size is a size such as 5GB or 500MB; got {size!r}.")


class Observer(Watcher):
    """Told what a job does, so that a person can see it. This one looks away."""

    def stage(self, name: str) -> None:
        """A new stage begins."""

    def evaluated(self, done: int, total: int) -> None:
        """So many windows of an evaluation, or answers of a task, are done."""


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns.

    model : pruned, in memory; None where its weights were left on disk
    report : what was done and measured
    directory, url : where it was saved and pushed
    commit : id of the Hub's commit that holds it
    dense_bytes : of the files with weights before they were packed; None where they were not
    """

    model: Any
    tokenizer: Any
    report: Report
    directory: Path | None = None
    url: str | None = None
    commit: str | None = None
    dense_bytes: int | None = None
