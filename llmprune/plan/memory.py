"""Where the memory goes: the terms of a run's peak, each with its name.

What counts is memory that no file stands behind. The weights of a safetensors checkpoint are mapped, so they take
memory of their own only when they are written to: when they have been pruned. A run goes through stages that come one
after the other; the peak is that of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.checkpoint.layout import converted_parameters
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.eval.losses import LOGITS_MEMORY
from llmprune.machine import compute_dtype, fits_there, free_bytes
from llmprune.pipeline.distill import HELD_BYTES, TOP
from llmprune.plan.sketch import Sketch
from llmprune.plan.source import DEQUANTIZED, Source
from llmprune.plan.workload import Load, Solve

__all__ = ["Memory", "Term", "memory_of"]


@dataclass(frozen=True)
class Term:
    """A part of a stage's memory.

    on_device : whether it lies where layers are computed, which is another memory than the host's on a GPU
    """

    name: str
    nbytes: int
    on_device: bool = False


@dataclass(frozen=True)
class Memory:
    """stages : name → its terms
    peak_bytes, device_bytes : the most of the host's memory, and of a GPU's (0 without one)
    """

    stages: dict[str, tuple[Term, ...]]
    peak_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class Job:
    """What a run will be asked to do, and on what.

    pruned : names of the parameters that it prunes
    base_bytes : what the process holds before it loads anything
    low_memory : whether weights stay on disk until their layer's turn
    in_files : whether hidden states lie in mapped files
    """

    source: Source
    sketch: Sketch
    loads: Sequence[Load]
    config: PruneConfig
    evaluation: EvaluationConfig
    device: torch.device
    pruned: frozenset[str]
    base_bytes: int
    low_memory: bool = False
    in_files: bool = False


def memory_of(job: Job) -> Memory:
    """The stages of a run and their terms."""
    weights = _weights(job)
    base = Term("Python, torch and transformers", job.base_bytes)
    stages = {} if job.source.converted is None else {"load": (base, *weights, *_conversion(job))}
    stages["prune"] = (base, *weights, *_walk(job))
    if job.config.distill:
        stages["distill"] = (base, *weights, *_distill(job))
    if job.evaluation.eval_dataset:
        stages["evaluate"] = (base, *weights, *_evaluate(job))
    stages["save and verify"] = (base, *weights, *_reload(job))
    apart = job.device.type != "cpu"
    host = {name: sum(t.nbytes for t in terms if not (apart and t.on_device)) for name, terms in stages.items()}
    device = {name: sum(t.nbytes for t in terms if t.on_device) for name, terms in stages.items()}
    return Memory(stages, max(host.values()), max(device.values()) if apart else 0)


def _weights(job: Job) -> tuple[Term, ...]:
    """Weights that take memory of their own once all layers are pruned."""
    model, sizes = job.sketch.model, _sizes(job.sketch.model)
    if job.low_memory:
        layers = [_layer_bytes(layer) for layer in job.sketch.survey.decoder.layers]
        return (Term("one layer's weights", max(layers)),)
    if job.source.converted is not None:
        return (Term(f"all weights, {job.source.converted}", sum(sizes.values())),)
    apart = converted_parameters(model)
    fused = sum(size for name, size in sizes.items() if name in apart)
    written = sum(size for name, size in sizes.items() if name in job.pruned - apart)
    terms = (
        Term("pruned weights, no longer those of the file", written),
        Term("weights that loading rearranges", fused),
    )
    return tuple(term for term in terms if term.nbytes)


def _conversion(job: Job) -> tuple[Term, ...]:
    """The tensor that is being converted; out of another form it goes through two copies."""
    copies = 2 if job.source.converted == DEQUANTIZED else 1
    return (Term("the largest weight while it is converted", copies * max(_sizes(job.sketch.model).values())),)


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: p.numel() * p.element_size() for name, p in model.named_parameters()}


def _layer_bytes(layer: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in layer.parameters())


def _walk(job: Job) -> tuple[Term, ...]:
    """What the layers' turns take beside the weights, at the layer that takes most."""
    config, paths = job.config, 2 if job.config.dense_targets or job.config.tune else 1
    assert config.seq_len is not None
    tokens = config.num_samples * config.seq_len
    if config.recipe.statistic is None and not config.tune and not config.distill:
        tokens = config.batch_size * config.seq_len  # one batch shows the errors
    hidden = 0 if job.in_files else paths * tokens * _hidden_bytes(job)
    turns = [_turn(job, index, load, tokens, paths) for index, load in enumerate(job.loads)]
    largest = max(turns, key=lambda terms: sum(term.nbytes for term in terms))
    terms = (Term("hidden states of the calibration windows", hidden, on_device=True), *largest)
    return tuple(term for term in terms if term.nbytes)


def _hidden_bytes(job: Job) -> int:
    """Of one token: what goes from layer to layer, in the dtype that layers are computed in."""
    config = job.sketch.model.config.get_text_config()
    return int(config.hidden_size) * _computed(job, job.source.dtype).itemsize


def _computed(job: Job, dtype: torch.dtype) -> torch.dtype:
    return compute_dtype(job.device, dtype)


def _turn(job: Job, index: int, load: Load, tokens: int, paths: int) -> tuple[Term, ...]:
    layer = job.sketch.survey.decoder.layers[index]
    config = job.config
    assert config.seq_len is not None
    windows = tokens // config.seq_len
    per_batch = max(1, load.waiting_bytes * config.batch_size * paths)
    batches = min(-(-windows // config.batch_size), max(1, free_bytes(job.device) // 2 // per_batch))
    computed = [(p.numel(), p.element_size(), _computed(job, p.dtype).itemsize) for p in layer.parameters()]
    moved = job.device.type != "cpu" or any(stored != kind for _, stored, kind in computed)
    copy = sum(count * kind for count, _, kind in computed) if moved else 0
    dense = sum(count * kind for count, _, kind in computed) if paths == 2 else 0
    waiting = [solve for solve in load.solves if solve.cold]  # all of them until the last, and what they pool
    pooled = sum(solve.statistic_bytes * (solve.together + 1) for solve in waiting)
    group = max(load.solves, key=lambda s: _met_at_once(s) + s.work.peak, default=None)
    terms = [
        Term("activations of windows that wait in a layer", batches * per_batch, on_device=True),
        Term("the layer where it is computed", copy, on_device=True),
        Term("its dense weights, to compare with", dense, on_device=True),
    ]
    if group is not None:
        name = group.kind.__name__ if group.kind is not None else ""
        terms.append(Term(f"statistics ({name})", pooled + _met_at_once(group), on_device=True))
        terms.append(Term("the solver's work on the largest group", round(group.work.peak), on_device=True))
    if config.tune or config.distill:
        layers = len(job.loads) if config.distill else 1
        terms.append(Term("masks", layers * sum(count for count, _, _ in computed)))
    if config.tune:
        terms.append(Term("tuning: copies, gradients, moments", 5 * 4 * sum(n for n, _, _ in computed), on_device=True))
    return tuple(terms)


def _met_at_once(solve: Solve) -> int:
    """Bytes of the statistics that are let go when they are solved."""
    return 0 if solve.cold else solve.statistic_bytes * solve.together


def _distill(job: Job) -> tuple[Term, ...]:
    """All pruned weights in float32 five times over, and the activations of one batch in all layers."""
    config = job.config
    assert config.seq_len is not None
    count = sum(p.numel() for name, p in job.sketch.model.named_parameters() if name in job.pruned)
    kept = config.num_samples * config.seq_len * TOP * 6
    activations = config.batch_size * sum(load.waiting_bytes for load in job.loads) * 2
    size = sum(_sizes(job.sketch.model).values())
    there = job.device.type != "cpu" and fits_there(job.device, size + HELD_BYTES * count)
    terms = (
        Term("copies, gradients and moments of the pruned weights", HELD_BYTES * count, there),
        Term("masks, where they are used", count, there),
        Term("activations of a batch in all layers", activations, there),
        Term("the model where it is computed", size if there else 0, there),
        Term("masks, where they are kept", count if there else 0),
        Term("the dense model's predictions", kept),
    )
    return tuple(term for term in terms if term.nbytes)


def _evaluate(job: Job) -> tuple[Term, ...]:
    """Logits, in the model's dtype, in float32, and their log-softmax; a few windows' activations."""
    seq_len = job.evaluation.eval_seq_len or job.config.seq_len
    assert seq_len is not None
    vocabulary = int(job.sketch.model.config.get_text_config().vocab_size)
    size = job.source.dtype.itemsize
    bytes_of_window = seq_len * vocabulary * 4
    windows = max(1, min(16, LOGITS_MEMORY // bytes_of_window))
    logits = min(windows * bytes_of_window, max(LOGITS_MEMORY, vocabulary * 4))
    placed = job.device.type != "cpu"
    terms = [
        Term("logits, and what the cross-entropy makes of them", logits * (2 + size // 4) + logits * size // 4, placed)
    ]
    waiting = max(load.waiting_bytes for load in job.loads) / max(1, job.config.seq_len or 1) * seq_len * windows
    terms.append(Term("activations of the windows at once", round(waiting), placed))
    if placed:
        terms.append(Term("the model where it is computed", sum(_sizes(job.sketch.model).values()), True))
    return tuple(terms)


def _reload(job: Job) -> tuple[Term, ...]:
    """The proof loads what was saved once more: mapped, but for what loading rearranges."""
    model: Any = job.sketch.model
    apart, sizes = converted_parameters(model), _sizes(model)
    rearranged = 0 if job.low_memory else sum(size for name, size in sizes.items() if name in apart)
    largest = max(sizes.values())
    terms = (
        Term("the saved model once more, rearranged", rearranged),
        Term("a tensor that is counted and digested", largest),
    )
    return tuple(term for term in terms if term.nbytes)
