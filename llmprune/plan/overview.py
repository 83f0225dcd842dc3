"""A run foretold: what it would prune, what would come out, and what it would take."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llmprune.checkpoint.provenance import command_line, tool_versions
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.errors import UserError
from llmprune.eval.perplexity import CPU_TOKENS, default_seq_len
from llmprune.job.prepare import FITS
from llmprune.machine import compute_dtype, device_named, free_bytes, held_bytes
from llmprune.pipeline.plan import Plan, make_plan
from llmprune.plan.duration import Duration, duration_of
from llmprune.plan.gains import gains
from llmprune.plan.memory import Job, Memory, memory_of
from llmprune.plan.sizes import Sizes, file_sizes, planned_weights
from llmprune.plan.sketch import Sketch, hollow_model, sketch
from llmprune.plan.source import DEQUANTIZED, Source, read_source
from llmprune.plan.speed import Speed, measure
from llmprune.plan.workload import load_of
from llmprune.results import PrunedWeight, SkippedWeight
from llmprune.sparsity.allocation import Allocation

__all__ = ["Forecast", "Request", "forecast"]

GPU_EVAL_TOKENS = 300_000
"""Tokens of a whole evaluation text, about: those of WikiText-2's test part."""


@dataclass(frozen=True)
class Request:
    """What is asked for; the fields mean what they mean to a run."""

    model: str
    config: PruneConfig
    evaluation: EvaluationConfig
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    format: str = "dense"
    low_memory: bool | None = None
    activations_dir: Path | None = None


@dataclass(frozen=True)
class Forecast:
    """Everything that a plan says.

    weights : what would be pruned, as the run's report would list it; skipped : what stays dense, and why
    settled : whether the run has no choice left; an allocation is measured on the weights
    memory : of the run; low_memory : whether its weights stay on disk; least_memory : what it would take then
    gains : program → one sentence
    """

    request: Request
    source: Source
    weights: tuple[PrunedWeight, ...]
    skipped: tuple[SkippedWeight, ...]
    settled: bool
    sizes: Sizes
    memory: Memory
    low_memory: bool
    least_memory: Memory | None
    duration: Duration
    speed: Speed
    device: torch.device
    gains: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The document that `llmprune plan --json` prints."""
        bytes_of = self.sizes.weights
        weights = [
            {"name": row.name, "decision": "prune", "shape": list(row.shape), "layer": row.layer}
            | {"pattern": row.pattern, "scope": row.scope, "zeros": row.zeros}
            | {"bytes_dense": bytes_of[row.name][0], "bytes_packed": bytes_of[row.name][1]}
            for row in self.weights
        ]
        weights += [
            {"name": row.name, "decision": "skip", "shape": list(row.shape), "reason": row.reason}
            for row in self.skipped
        ]
        sizes = {name: value for name, value in asdict(self.sizes).items() if name != "weights"}
        stages = {
            stage: [{"name": term.name, "bytes": term.nbytes} for term in terms]
            for stage, terms in self.memory.stages.items()
        }
        return {
            "command": command_line(),
            "versions": tool_versions(self.device),
            "model": self.source.name,
            "config": asdict(self.request.config),
            "settled": self.settled,
            "weights": weights,
            "bytes": sizes,
            "memory": {
                "peak_bytes": self.memory.peak_bytes,
                "device_bytes": self.memory.device_bytes,
                "low_memory": self.low_memory,
                "peak_bytes_with_low_memory": self.least_memory.peak_bytes if self.least_memory is not None else None,
                "stages": stages,
            },
            "time": {"seconds": self.duration.seconds, **asdict(self.duration), "speed": asdict(self.speed)},
            "gains": self.gains,
            "notes": list(self.notes),
        }


def forecast(request: Request) -> Forecast:
    """Plan a run without reading a weight.

    Raises
    ------
    UserError
        for whatever the run would refuse before it begins, as far as configuration and headers show it.
    """
    if request.format not in ("dense", "packed"):
        raise UserError(f"format is one of dense, packed; got {request.format!r}.")
    start_seconds = time.time() - psutil.Process(os.getpid()).create_time()
    device, began = device_named(request.device), time.perf_counter()
    source = read_source(
        request.model,
        revision=request.revision,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    read_seconds = time.perf_counter() - began
    model = hollow_model(source.config, source.dtype, trust_remote_code=request.trust_remote_code)
    base_bytes = held_bytes()
    config, evaluation = _settled(request, model, device)
    drawn = sketch(model, config, device=device)
    plan = _plan(drawn, config, device)
    survey = plan.applied_to(drawn.survey)
    rows = planned_weights(survey, plan, config.recipe)
    sizes = file_sizes(model, source, rows)
    loads = load_of(drawn, survey.schedules, plan, config, device=device)
    pruned = frozenset(row.parameter for row in rows)
    low_memory, in_files = _rests_on_disk(request, source), request.activations_dir is not None
    job = Job(source, drawn, loads, config, evaluation, device, pruned, base_bytes, low_memory, in_files)
    speed = _speed(job)
    return Forecast(
        request=replace(request, config=config, evaluation=evaluation),
        source=source,
        weights=tuple(rows),
        skipped=tuple(survey.skipped),
        settled=config.allocation == "uniform",
        sizes=sizes,
        memory=memory_of(job),
        low_memory=low_memory,
        least_memory=memory_of(replace(job, low_memory=True)) if _can_rest(request, source) else None,
        duration=duration_of(
            job,
            speed,
            start_seconds=start_seconds,
            read_seconds=read_seconds,
            eval_tokens=evaluation.eval_tokens or GPU_EVAL_TOKENS,
            files_bytes=sizes.dense,
        ),
        speed=speed,
        device=device,
        gains=gains(config.pattern, source.dtype, packed_share=sizes.packed / sizes.dense),
        notes=(*source.notes, *_notes(config)),
    )


def _can_rest(request: Request, source: Source) -> bool:
    """Whether the weights can stay on disk: plain ones, and no step that needs them all."""
    return source.stored is not None and source.converted != DEQUANTIZED and not request.config.distill


def _rests_on_disk(request: Request, source: Source) -> bool:
    """Whether they do: if that was asked for, or they would not fit, as `llmprune.job.prepare` decides it."""
    if request.low_memory is None:
        size = source.file_bytes or 0
        return _can_rest(request, source) and size > FITS * free_bytes(torch.device("cpu"))
    if request.low_memory and not _can_rest(request, source):
        raise UserError(
            "--low-memory takes a plain checkpoint in safetensors and no distillation: give an unquantized model, add "
            "--distill 0, or leave --low-memory out."
        )
    return request.low_memory


def _settled(request: Request, model: Any, device: torch.device) -> tuple[PruneConfig, EvaluationConfig]:
    """Both with what depends on the model filled in, as a run does it."""
    seq_len = request.config.seq_len or default_seq_len(model.config)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise UserError(f"--seq-len may be at most {longest} for this model; got {seq_len}.")
    tokens = request.evaluation.eval_tokens
    if tokens is None and device.type == "cpu":
        tokens = max(CPU_TOKENS, seq_len)
    length = request.evaluation.eval_seq_len or seq_len
    config = replace(request.config, seq_len=seq_len)
    if config.num_samples <= config.batch_size:  # none can be held out to decide, so a run leaves these out
        config = replace(config, dense_targets=False, tune=0, distill=0)
    return config, replace(request.evaluation, eval_tokens=tokens, eval_seq_len=length)


def _plan(drawn: Sketch, config: PruneConfig, device: torch.device) -> Plan:
    """The pattern of every weight; where an allocation will measure, that which all would get without it."""
    no_windows = torch.empty(0, 0, dtype=torch.int64)
    return make_plan(
        drawn.model,
        no_windows,
        Allocation(config.pattern),
        drawn.survey,
        device=device,
        scope=config.recipe.method.scope,
        overrides=config.override_map,
    )


def _speed(job: Job) -> Speed:
    config = job.sketch.model.config.get_text_config()
    inner = max(sum(solve.rows) for load in job.loads for solve in load.solves)
    tokens = (job.config.seq_len or 1) * job.config.batch_size
    dtype = compute_dtype(job.device, job.source.dtype)
    return measure(job.device, dtype, tokens=tokens, hidden=int(config.hidden_size), inner=inner)


def _notes(config: PruneConfig) -> list[str]:
    if config.allocation == "uniform":
        return []
    budget = "" if config.budget is None else f", {config.budget:.0%} of all weights zero"
    measures = f"allocation {config.allocation!r} measures on the weights how many zeros each gets{budget}"
    return [f"{measures}; listed is what they would get if all were alike"]
