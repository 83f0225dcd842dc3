"""Before the work: everything that can fail early does so here, and nothing is changed yet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint.hub import Destination, check_access
from llmprune.checkpoint.target import check_output
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.data import bos_token, calibration_windows, load_corpus
from llmprune.distributed import Team
from llmprune.errors import UserError
from llmprune.eval.measure import Wanted
from llmprune.eval.perplexity import CPU_TOKENS, default_seq_len
from llmprune.eval.zero_shot import check_zero_shot
from llmprune.job.request import Job
from llmprune.machine import free_bytes
from llmprune.model import Loaded, load, located, shelf_of, stored_bytes
from llmprune.pipeline import Survey

__all__ = [
    "Settled",
    "calibration",
    "check_early",
    "load_model",
    "require_same_model",
    "rests_on_disk",
    "settle",
    "target_path",
    "wanted_measures",
]

FITS = 0.8
"""A model is loaded whole if its files are no larger than this share of the free memory."""

GLANCE = 4096
"""So many weights are looked at to tell one model from another of the same shape."""

AT_ONCE = 8
"""Windows of an evaluation per forward of a model that rests on disk: every forward reads all its weights."""

CHARACTERS_PER_TOKEN = 64
"""How much text is read for each calibration token, so that the seed has a choice (a token has 3 to 5 characters)."""


def check_early(job: Job, team: Team) -> Destination | None:
    """What needs no model: the output, and access to the Hub. Returns where to push to, if anywhere."""
    _check_team(job, team)
    if job.format not in ("dense", "packed"):
        raise UserError(f"format is one of dense, packed; got {job.format!r}.")
    if job.format == "packed" and job.output_dir is None and not job.default_output:
        raise UserError("format 'packed' is about what is saved: give output_dir too.")
    _check_scale(job)
    check_zero_shot(job.evaluation.eval_tasks, job.evaluation.task_data, job.evaluation.eval_limit)
    if job.output_dir is not None:
        check_output(job.output_dir, overwrite=job.overwrite, source=_source(job, None), need_bytes=0)
    return _check_push(job)


def _check_push(job: Job) -> Destination | None:
    if job.push_to_hub is None:
        if job.hub_private_repo or job.hub_revision is not None or job.hub_create_pr:
            raise UserError("hub_private_repo, hub_revision and hub_create_pr are about a push: give push_to_hub too.")
        return None
    asked = Destination(job.push_to_hub, job.hub_private_repo, job.hub_revision, job.hub_create_pr)
    if job.output_dir is None and not job.default_output:
        raise UserError("pushing needs a saved and verified checkpoint: give output_dir too.")
    return check_access(asked, _default_name(job.config, _base_name(job.model)))


def _check_team(job: Job, team: Team) -> None:
    steps = {"--tune 0": job.config.tune, "--distill 0": job.config.distill}
    if team.size > 1 and any(steps.values()):
        cure = " ".join(option for option, asked in steps.items() if asked)
        raise UserError(
            f"several processes cannot tune or distill, which goes from window to window: add {cure}, or start one "
            f"process; there are {team.size}."
        )


def _check_scale(job: Job) -> None:
    if job.resume not in ("auto", "never"):
        raise UserError(f"resume is one of auto, never; got {job.resume!r}.")
    if job.safe_points < 0:
        raise UserError(f"safe_points are seconds, at least 0; got {job.safe_points:g}.")
    if job.activations_dir is not None and os.name == "nt":
        raise UserError("--activations-dir needs files that can be removed while they are mapped; Windows has none.")
    if not job.low_memory:
        return
    given = isinstance(job.model, str | os.PathLike)
    if not given or (job.output_dir is None and not job.default_output):
        what = "output_dir is missing" if given else f"{type(job.model).__name__} is in memory already"
        raise UserError(f"low_memory goes from files to files: give a hub id or directory, and output_dir; {what}.")
    if job.config.distill:
        raise UserError(
            "--low-memory cannot distill, which needs the whole model in memory several times over: add --distill 0 "
            "(for --effort best too), or leave --low-memory out."
        )


def rests_on_disk(job: Job, say: Callable[[str], None], *, neighbours: int = 1) -> bool:
    """Whether the weights stay on disk: if that was asked for, or they do not fit in memory and it can be done.

    `neighbours` processes load the model into this machine's memory.
    """
    if job.low_memory is not None:
        return job.low_memory
    saves = job.output_dir is not None or job.default_output
    if not isinstance(job.model, str | os.PathLike) or not saves or job.config.distill:
        return False
    name = os.fspath(job.model)
    if name == "demo" or name.endswith(".gguf"):
        return False
    size, free = stored_bytes(name, job.revision), free_bytes(torch.device("cpu"))
    if size is None or neighbours * size <= FITS * free:
        return False
    times = f", {neighbours} times," if neighbours > 1 else ""
    say(f"The model's {size / 1e9:.1f} GB{times} do not fit in {free / 1e9:.1f} GB of free memory: --low-memory.")
    return True


def load_model(job: Job, *, rest_on_disk: Path | None = None) -> Loaded:
    """The model, loaded or as it was given; hollow where a directory for weights that are converted is given."""
    if isinstance(job.model, str | os.PathLike):
        return load(
            os.fspath(job.model),
            revision=job.revision,
            dtype=job.dtype,
            trust_remote_code=job.trust_remote_code,
            rest_on_disk=rest_on_disk,
        )
    name = getattr(job.model.config, "_name_or_path", "") or type(job.model).__name__
    source = Path(name) if Path(name).is_dir() else None
    return Loaded(job.model, job.tokenizer, name, Path(name).name, None, source)


def settle(job: Job, loaded: Loaded, device: torch.device, say: Callable[[str], None]) -> Settled:
    """Fill in what depends on the model, so that the report holds the numbers that were used."""
    limit = default_seq_len(loaded.model.config)
    given = job.dataset.shape[-1] if isinstance(job.dataset, torch.Tensor) else None
    seq_len = job.config.seq_len or given or limit
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and 0 < longest < seq_len:
        raise UserError(f"--seq-len may be at most {longest} for this model; got {seq_len}.")
    config = replace(job.config, seq_len=seq_len)
    if isinstance(job.dataset, torch.Tensor):
        config = replace(config, num_samples=min(config.num_samples, len(job.dataset)))
    tokens = job.evaluation.eval_tokens
    if tokens is None and device.type == "cpu" and job.evaluation.eval_dataset:
        tokens = max(CPU_TOKENS, seq_len)
        say(f"On a CPU, perplexity is measured on the first {tokens:,} tokens of each data set (--eval-tokens).")
    evaluation = replace(job.evaluation, eval_tokens=tokens, eval_seq_len=job.evaluation.eval_seq_len or seq_len)
    return Settled(config, evaluation, _target(job, loaded))


@dataclass(frozen=True)
class Settled:
    """A job's settings with nothing left open.

    target : the directory of the checkpoint, checked; None: it is not saved
    """

    config: PruneConfig
    evaluation: EvaluationConfig
    target: Path | None


def require_same_model(team: Team, loaded: Loaded, survey: Survey) -> None:
    """Raise UserError if processes have found different models under the same name, as far as a glance can tell."""
    if team.size == 1:
        return
    weights = next(loaded.model.parameters()).detach().flatten()[:GLANCE]
    seen = [] if weights.is_meta else weights.float().tolist()
    settings = {**loaded.model.config.to_dict(), "_name_or_path": None}
    known = repr((survey.schedules, settings, seen))
    mine = int.from_bytes(hashlib.sha256(known.encode()).digest()[:4], "big")
    if team.total(mine) != [mine * team.size]:
        raise UserError(
            f"the processes have different models under the name {loaded.name}: put the same files everywhere."
        )


def calibration(job: Job, config: PruneConfig, loaded: Loaded) -> tuple[torch.Tensor, dict[str, Any]]:
    """The calibration tokens (num_samples, seq_len), and where they come from."""
    assert config.seq_len is not None
    source = config.dataset if job.dataset is None else job.dataset
    if isinstance(source, torch.Tensor):
        origin, bos = {"name": f"token ids {tuple(source.shape)} given"}, None  # token ids are taken as they are
    else:
        if loaded.tokenizer is None:
            raise UserError(_no_tokenizer(loaded))
        source = load_corpus(
            source,
            purpose="calibration",
            text_column=config.text_column,
            tokenizer=loaded.tokenizer,
            enough_characters=CHARACTERS_PER_TOKEN * config.num_samples * config.seq_len,
        )
        origin = {"name": source.name, **source.provenance}
        bos = bos_token(config.bos, loaded.tokenizer, loaded.model.config.model_type)  # type: ignore[arg-type]
    windows = calibration_windows(
        source,
        loaded.tokenizer,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=config.seed,
        bos=bos,
    )
    embedding, largest = loaded.model.get_input_embeddings(), int(windows.max())
    known = getattr(embedding, "num_embeddings", None)  # nn.Embedding's
    if known is not None and largest >= known:
        raise UserError(
            f"the calibration tokens go up to {largest}, and the model knows {known}, 0 to {known - 1}: give the "
            "tokenizer that belongs to the model."
        )
    return windows, origin


def _no_tokenizer(loaded: Loaded) -> str:
    if loaded.directory is not None:
        return f"{loaded.name} holds no tokenizer, which turns text into tokens: put its files beside the weights."
    return "a model in memory needs its tokenizer, to turn text into tokens: give tokenizer=… too."


def wanted_measures(evaluation: EvaluationConfig, config: PruneConfig, loaded: Loaded) -> Wanted:
    """What to measure before and after, with the texts for perplexity."""
    if evaluation.asks_for_something and loaded.tokenizer is None:
        raise UserError(_no_tokenizer(loaded))
    tokens = evaluation.eval_tokens
    enough = None if tokens is None else CHARACTERS_PER_TOKEN * max(tokens, evaluation.eval_seq_len or 0)
    rests = shelf_of(loaded.model) is not None
    return Wanted(
        [
            load_corpus(name, purpose="evaluation", tokenizer=loaded.tokenizer, enough_characters=enough)
            for name in evaluation.eval_dataset
        ],
        tokens=tokens,
        seq_len=evaluation.eval_seq_len,
        bos=config.bos,  # type: ignore[arg-type]
        batch_size=AT_ONCE if rests else None,
        generations=not rests,
        tasks=evaluation.eval_tasks,
        data=evaluation.task_data,
        limit=evaluation.eval_limit,
    )


def target_path(job: Job, base: str | None = None) -> Path | None:
    """Where the checkpoint goes, absolute; `base` is the model's name, by which the output is named by default."""
    if job.output_dir is None and not job.default_output:
        return None
    path = job.output_dir or Path(_default_name(job.config, base or _base_name(job.model)))
    return Path(path).expanduser().resolve()


def _target(job: Job, loaded: Loaded) -> Path | None:
    path = target_path(job, loaded.base_name)
    if path is None:
        return None
    size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    # It is proved dense before it is packed; and the layers of a model that rests on disk are written twice.
    need = size * (1 + (job.format == "packed") + (shelf_of(loaded.model) is not None))
    return check_output(path, overwrite=job.overwrite, source=_source(job, loaded.directory), need_bytes=need)


def _source(job: Job, directory: Path | None) -> Path | None:
    """What must not be changed: the directory that was loaded, or the directory or file that was named."""
    named = Path(os.fspath(job.model)) if isinstance(job.model, str | os.PathLike) else None
    return directory or (named if named is not None and named.exists() else None)


def _default_name(config: PruneConfig, base: str) -> str:
    return f"{base}-{config.name_suffix}"


def _base_name(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        path = located(os.fspath(model), None, "auto")
        return path.stem if path.suffix == ".gguf" else (path.resolve() if path.exists() else path).name
    return Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name
