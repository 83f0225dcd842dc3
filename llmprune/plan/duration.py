"""How long a run will take: its operations, counted, over what the machine was measured to do.

An estimate: other programs, caches and the shapes of single products are not in it, nor is the time to fetch models
and texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmprune.eval.perplexity import default_seq_len
from llmprune.pipeline.plan import MEASURED, WINDOWS
from llmprune.plan.counting import Work
from llmprune.plan.memory import Job
from llmprune.plan.speed import Speed

__all__ = ["Duration", "duration_of"]

READINGS = 15
"""What it costs to save and to prove, in readings of every byte of the checkpoint at the speed of additions: zeros and
groups are counted before and after, and counting is several times slower than adding. So it was on an AMD EPYC."""

OPENINGS = 3
"""How often the description of a model is read: for its configuration, its weights and its tokenizer. For a GGUF that
takes longer than all the rest of loading."""

DIGESTS = 3
"""Before, after, and as saved."""


@dataclass(frozen=True)
class Duration:
    """Seconds by stage, and within the stage "prune" by what they are spent on."""

    stages: dict[str, float]
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """All stages."""
        return sum(self.stages.values())


def duration_of(
    job: Job, speed: Speed, *, start_seconds: float, read_seconds: float, eval_tokens: int, files_bytes: int
) -> Duration:
    """Seconds of a run.

    Parameters
    ----------
    start_seconds : until the process had its libraries
    read_seconds : to read the configuration and the headers
    eval_tokens : of each data set
    files_bytes : of the files that are written
    """
    parts = _prune(job, speed)
    window = sum(_forward(load.forward, speed) for load in job.loads)
    weights = sum(p.numel() for p in job.sketch.model.parameters())
    stages = {"start": start_seconds, "load": OPENINGS * read_seconds}
    if job.source.converted is not None:
        stages["load"] += 3 * files_bytes / speed.moved
    stages["survey"] = 3 * window  # the model's own forward, the replay and the survey
    if job.config.allocation != "uniform":
        stages["allocation"] = _allocation(job, window)
    stages["prune"] = sum(parts.values())
    if job.config.distill:
        stages["distill"] = 3 * job.config.distill * job.config.num_samples * (window + _head(job, speed))
    digest = DIGESTS * files_bytes / speed.digested
    stages["save and verify"] = digest + READINGS * files_bytes / speed.moved + 4 * weights / speed.forward * 16
    if job.evaluation.eval_dataset and eval_tokens:
        seq_len = job.evaluation.eval_seq_len or job.config.seq_len or default_seq_len(job.sketch.model.config)
        windows = len(job.evaluation.eval_dataset) * eval_tokens / (job.config.seq_len or seq_len)
        stages["evaluate twice"] = 2 * windows * (window + _head(job, speed))
    return Duration(stages, parts)


def _prune(job: Job, speed: Speed) -> dict[str, float]:
    """Seconds of the layers' turns."""
    config = job.config
    batches = -(-config.num_samples // config.batch_size)
    if config.recipe.statistic is None and not config.tune and not config.distill:
        batches = 1
    windows = batches * config.batch_size
    paths = 2 if config.dense_targets or config.tune else 1
    parts = dict.fromkeys(("forward", "statistics", "solve"), 0.0)
    for load in job.loads:
        calls = load.forward.calls * (batches - windows) / speed.calls  # a batch is one call, whatever it holds
        forward = windows * _forward(load.forward, speed) + calls
        parts["forward"] += forward * (paths + load.again)
        for solve in load.solves:
            products = speed.products if solve.factors == torch.float32 else speed.forward
            parts["statistics"] += solve.times * (solve.update.products / products + solve.update.moved / speed.moved)
            parts["solve"] += solve.times * _solving(solve.work, speed)
        if config.tune:
            parts["tuning"] = parts.get("tuning", 0.0) + 3 * config.tune * forward
        if config.permute:
            parts["permutations"] = parts.get("permutations", 0.0) + forward
    return parts


def _allocation(job: Job, window: float) -> float:
    """See `llmprune.pipeline.plan`: "error" prunes every linear on trial at three levels, on a few windows."""
    if job.config.allocation != "error":
        return WINDOWS * window
    layers = len(job.loads)
    trials = 3 * sum(len(solve.rows) for load in job.loads for solve in load.solves) / layers
    return window * (WINDOWS + MEASURED * (trials + layers / 2))


def _forward(work: Work, speed: Speed) -> float:
    """Seconds of a forward of one window."""
    return (work.products + work.attention) / speed.forward + work.moved / speed.moved + work.calls / speed.calls


def _solving(work: Work, speed: Speed) -> float:
    """Seconds of work in float32."""
    products = (work.products + work.attention) / speed.products + work.factorings / speed.factorings
    return products + work.moved / speed.moved + work.calls / speed.calls


def _head(job: Job, speed: Speed) -> float:
    """Seconds of the logits of one window of calibration length."""
    config = job.sketch.model.config.get_text_config()
    logits = float((job.config.seq_len or 0) * config.vocab_size)
    return 2 * logits * float(config.hidden_size) / speed.forward + 16 * logits / speed.moved
