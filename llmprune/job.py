"""The whole job, from a model's name to a verified checkpoint: what the command line and `llmprune.prune()` both call.

Order: everything that can fail early fails before the work (names, output, access to the Hub, texts, configurations);
then dense evaluation, pruning, saving with proof, and last the evaluation of what was saved, so that hours of pruning
are on disk before anything else can go wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import llmprune
from llmprune.checkpoint import hub
from llmprune.checkpoint.layout import fingerprint, saved_ties
from llmprune.checkpoint.probe import take_probe
from llmprune.checkpoint.report import REPORT, Report, command_line, describe_tensors, tool_versions, totals
from llmprune.checkpoint.save import check_generation_config, write
from llmprune.checkpoint.target import check_output, publish
from llmprune.checkpoint.verify import SAME_LOGITS, Verification, verify
from llmprune.config import EvaluationConfig, PruneConfig, from_mapping
from llmprune.data import Corpus, bos_token, calibration_windows, load_corpus
from llmprune.errors import HubError, UserError
from llmprune.eval.perplexity import Perplexity, default_seq_len, evaluate
from llmprune.machine import device_named, peak_memory, placed
from llmprune.model import Loaded, load, quiet_transformers
from llmprune.pipeline import Pruned, Watcher, prune_layers, survey_model

__all__ = ["Job", "Observer", "PruneResult", "prune", "run"]

CPU_EVAL_TOKENS = 16_384
"""Tokens of each data set that an evaluation on a CPU reads by default: minutes, not hours."""

CHARACTERS_PER_TOKEN = 64
"""How much text is read for each calibration token, so that the seed has a choice (a token has 3 to 5 characters)."""


@dataclass(frozen=True)
class Job:
    """Everything that the command line can say, beside the two configs.

    model : hub id, directory, `.gguf` file, `demo`, or a transformers model in memory (which needs `tokenizer`)
    output_dir : where the checkpoint goes; None: it is not saved
    push_to_hub : repository id, "" for the default name in one's own namespace, None: no push
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
    default_output: bool = False
    overwrite: bool = False
    max_shard_size: str = "5GB"
    push_to_hub: str | None = None
    hub_private_repo: bool = False


class Observer(Watcher):
    """Told what a job does, so that a person can see it. This one looks away."""

    def stage(self, name: str) -> None:
        """A new stage begins."""

    def evaluated(self, done: int, total: int) -> None:
        """So many windows of an evaluation are done."""

    def say(self, sentence: str) -> None:
        """Something worth knowing."""


@dataclass(frozen=True)
class PruneResult:
    """model : pruned, in memory; report : what was done and measured; directory, url : where it was saved and pushed"""

    model: Any
    tokenizer: Any
    report: Report
    directory: Path | None = None
    url: str | None = None


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
    config, evaluation, rest = _split(settings)
    name = dataset if isinstance(dataset, str) else type(dataset).__name__
    return run(
        Job(
            model,
            config=from_mapping(PruneConfig, {**config, "dataset": name}),
            evaluation=from_mapping(EvaluationConfig, {**evaluation, "eval_dataset": eval_dataset}),
            dataset=dataset,
            tokenizer=tokenizer,
            output_dir=Path(output_dir) if output_dir is not None else None,
            **rest,
        ),
        observer,
    )


def _split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    evaluation: dict[str, Any] = {}
    for name in ("eval_tokens", "eval_seq_len"):
        if name in settings:
            evaluation[name] = settings.pop(name)
    own = set(Job.__dataclass_fields__) - {"model", "config", "evaluation", "dataset", "tokenizer", "output_dir"}
    rest = {name: settings.pop(name) for name in own & set(settings)}
    return settings, evaluation, rest


def run(job: Job, observer: Observer | None = None) -> PruneResult:
    """Do the job. See the top of this file for the order, and `Job` for what it takes."""
    return _Run(job, observer or Observer()).go()


class _Run:
    """One job under way: what it knows so far, stage by stage."""

    def __init__(self, job: Job, observer: Observer) -> None:
        self.job, self.observer = job, observer
        self.config, self.evaluation = job.config, job.evaluation
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.device = device_named(job.device)

    def go(self) -> PruneResult:
        repo = self._early_checks()
        with self._stage("load"):
            loaded = self._load()
            self._settle(loaded)
            target = self._target(loaded)
            self.notes += [*loaded.notes, *check_generation_config(loaded.model)]
        with self._stage("read texts"):
            windows, corpora = self._windows(loaded), self._evaluation_texts(loaded)
        with self._stage("survey"):
            survey = survey_model(loaded.model, windows, self.config, device=self.device)
        before = self._evaluate("evaluate dense", loaded, corpora)
        with self._stage("prune"):
            digests = fingerprint(loaded.model)
            pruned = prune_layers(
                loaded.model, windows, self.config, device=self.device, watcher=self.observer, survey=survey
            )
        report = self._report(loaded, pruned, digests, before)
        if target is not None:
            with self._stage("save and verify"), quiet_transformers():
                report = self._save(loaded, report, target)
        try:
            return self._finish(loaded, report, corpora, target, repo)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(str(target) if target is not None else "") from None

    def _finish(
        self, loaded: Loaded, report: Report, corpora: list[Corpus], target: Path | None, repo: str | None
    ) -> PruneResult:
        """What comes after the model is safe: the second evaluation and the push."""
        after = self._evaluate("evaluate pruned", loaded, corpora)
        report = replace(report, after=after, seconds=dict(self.seconds), peak_memory_bytes=peak_memory(self.device))
        if target is not None:
            _replace_report(report, target)
        result = PruneResult(loaded.model, loaded.tokenizer, report, target)
        if target is None or repo is None:
            return result
        try:
            with self._stage("push"):
                return replace(result, url=hub.push(target, repo, private=self.job.hub_private_repo))
        except HubError as error:
            error.result = result
            raise

    # Before the work --------------------------------------------------------------------------------------------------

    def _early_checks(self) -> str | None:
        job = self.job
        if job.output_dir is not None:
            source = Path(job.model) if isinstance(job.model, str) and Path(job.model).is_dir() else None
            check_output(job.output_dir, overwrite=job.overwrite, source=source, need_bytes=0)
        if job.push_to_hub is None:
            return None
        if job.output_dir is None and not job.default_output:
            raise UserError("pushing needs a saved and verified checkpoint: give output_dir too.")
        return hub.check_access(job.push_to_hub or None, self._default_name(_base_name(job.model)))

    def _load(self) -> Loaded:
        job = self.job
        if isinstance(job.model, str | os.PathLike):
            name = os.fspath(job.model)
            return load(name, revision=job.revision, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
        name = getattr(job.model.config, "_name_or_path", "") or type(job.model).__name__
        source = Path(name) if Path(name).is_dir() else None
        return Loaded(job.model, job.tokenizer, name, Path(name).name, None, source)

    def _settle(self, loaded: Loaded) -> None:
        """Fill in what depends on the model, so that the report holds the numbers that were used."""
        limit = default_seq_len(loaded.model.config)
        given = self.job.dataset.shape[-1] if isinstance(self.job.dataset, torch.Tensor) else None
        seq_len = self.config.seq_len or given or limit
        longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if longest and seq_len > longest:
            raise UserError(f"--seq-len may be at most {longest} for this model; got {seq_len}.")
        self.config = replace(self.config, seq_len=seq_len)
        tokens = self.evaluation.eval_tokens
        if tokens is None and self.device.type == "cpu" and self.evaluation.eval_dataset:
            tokens = max(CPU_EVAL_TOKENS, seq_len)
            self.observer.say(
                f"On a CPU, perplexity is measured on the first {tokens:,} tokens of each data set (--eval-tokens)."
            )
        self.evaluation = replace(
            self.evaluation, eval_tokens=tokens, eval_seq_len=self.evaluation.eval_seq_len or seq_len
        )

    def _target(self, loaded: Loaded) -> Path | None:
        path = self.job.output_dir
        if path is None and self.job.default_output:
            path = Path(self._default_name(loaded.base_name))
        if path is None:
            return None
        size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        return check_output(path, overwrite=self.job.overwrite, source=loaded.directory, need_bytes=size)

    def _default_name(self, base: str) -> str:
        return f"{base}-{self.config.name_suffix}"

    def _windows(self, loaded: Loaded) -> torch.Tensor:
        """The calibration tokens (num_samples, seq_len), and a note of where they come from."""
        seq_len, bos = self.config.seq_len, self._bos(loaded)
        assert seq_len is not None
        source = self.config.dataset if self.job.dataset is None else self.job.dataset
        if isinstance(source, torch.Tensor):
            self.config = replace(self.config, num_samples=min(self.config.num_samples, len(source)))
            self.text = {"name": f"token ids {tuple(source.shape)} given"}
        else:
            source = load_corpus(
                source,
                purpose="calibration",
                text_column=self.config.text_column,
                tokenizer=loaded.tokenizer,
                enough_characters=CHARACTERS_PER_TOKEN * self.config.num_samples * seq_len,
            )
            self.text = {"name": source.name, **source.provenance}
        samples, seed = self.config.num_samples, self.config.seed
        return calibration_windows(source, loaded.tokenizer, num_samples=samples, seq_len=seq_len, seed=seed, bos=bos)

    def _bos(self, loaded: Loaded) -> int | None:
        if isinstance(self.job.dataset, torch.Tensor):
            return None  # token ids are taken as they are
        if loaded.tokenizer is None:
            raise UserError("a model in memory needs its tokenizer, to turn text into tokens: give tokenizer=… too.")
        return bos_token(self.config.bos, loaded.tokenizer, loaded.model.config.model_type)  # type: ignore[arg-type]

    def _evaluation_texts(self, loaded: Loaded) -> list[Corpus]:
        tokens = self.evaluation.eval_tokens
        if self.evaluation.eval_dataset and loaded.tokenizer is None:
            raise UserError("evaluation needs the model's tokenizer: give tokenizer=… too, or no eval_dataset.")
        return [
            load_corpus(
                name,
                purpose="evaluation",
                tokenizer=loaded.tokenizer,
                enough_characters=None if tokens is None else CHARACTERS_PER_TOKEN * tokens,
            )
            for name in self.evaluation.eval_dataset
        ]

    # The work ---------------------------------------------------------------------------------------------------------

    def _evaluate(self, stage: str, loaded: Loaded, corpora: Sequence[Corpus]) -> tuple[dict[str, Any], ...]:
        if not corpora:
            return ()
        with self._stage(stage), placed(loaded.model, self.device):
            results: list[Perplexity] = [
                evaluate(
                    loaded.model,
                    loaded.tokenizer,
                    corpus,
                    tokens=self.evaluation.eval_tokens,
                    seq_len=self.evaluation.eval_seq_len,
                    bos=self.config.bos,  # type: ignore[arg-type]
                    progress=self.observer.evaluated,
                )
                for corpus in corpora
            ]
        return tuple(asdict(result) for result in results)

    def _report(
        self, loaded: Loaded, pruned: Pruned, digests: dict[str, str], before: tuple[dict[str, Any], ...]
    ) -> Report:
        tensors = describe_tensors(loaded.model, pruned.weights, before=digests)
        return Report(
            versions=tool_versions(self.device),
            command=command_line(),
            config={**asdict(self.config), **asdict(self.evaluation), "dtype": self.job.dtype},
            source={"id": loaded.name, "revision": loaded.revision, "calibration": self.text},
            pruned=tuple(pruned.weights),
            skipped=tuple(pruned.skipped),
            totals=totals(pruned.weights, tensors),
            tensors=tensors,
            ties=saved_ties(loaded.model),
            before=before,
            seconds=dict(self.seconds),
            peak_memory_bytes=peak_memory(self.device),
            notes=tuple(self.notes),
        )

    def _save(self, loaded: Loaded, report: Report, target: Path) -> Report:
        provenance = {
            "llmprune_version": llmprune.__version__,
            "model": loaded.name,
            "revision": loaded.revision,
            **report.config,
        }
        probe = take_probe(loaded.model)
        with publish(target, overwrite=self.job.overwrite) as directory:
            carried = write(
                loaded.model,
                loaded.tokenizer,
                directory,
                source=loaded.directory,
                max_shard_size=self.job.max_shard_size,
                provenance=provenance,
            )
            report = replace(
                report, tensors={**report.tensors, **carried.tensors}, notes=(*report.notes, *carried.notes)
            )
            report.write(directory)
            proof = verify(directory, probe=probe, trust_remote_code=self.job.trust_remote_code)
            if not isinstance(self.job.model, str | os.PathLike) and _only_logits_differ(proof):
                note = "the reloaded model's logits differ from the given one's, whose buffers must have been cast"
                report = replace(report, notes=(*report.notes, note))
                report.write(directory)
            else:
                proof.raise_if_failed()
        return report

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.observer.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _only_logits_differ(proof: Verification) -> bool:
    """A model given in memory may have been cast with its buffers (`model.half()`): its files are right even so."""
    return [check.what for check in proof.checks if not check.ok] == [SAME_LOGITS]


def _base_name(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        return Path(os.fspath(model)).name.removesuffix(".gguf")
    return Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name


def _replace_report(report: Report, directory: Path) -> None:
    """Write the finished report over the one that was saved with the model, in one step."""
    scratch = directory / ".report"
    scratch.mkdir(exist_ok=True)
    report.write(scratch).replace(directory / REPORT)
    scratch.rmdir()
