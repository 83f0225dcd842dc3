"""The stages of a job, in order."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import llmprune
from llmprune.checkpoint.base_card import read_base_card
from llmprune.checkpoint.card import write_card
from llmprune.checkpoint.convert import pack_files
from llmprune.checkpoint.hub import Destination
from llmprune.checkpoint.layout import fingerprint, saved_ties
from llmprune.checkpoint.partial import Partial
from llmprune.checkpoint.probe import take_probe
from llmprune.checkpoint.provenance import command_line, describe_model, now, tool_versions
from llmprune.checkpoint.push import push
from llmprune.checkpoint.report import REPORT, Report, describe_tensors, totals
from llmprune.checkpoint.save import check_generation_config, write
from llmprune.checkpoint.target import publish, write_errors
from llmprune.checkpoint.verify import SAME_LOGITS, Verification, verify
from llmprune.distributed import Team, team_from_environment
from llmprune.errors import HubError, LlmpruneError, UserError
from llmprune.eval.measure import Measured, Measures, Wanted
from llmprune.job.prepare import (
    calibration,
    check_early,
    load_model,
    require_same_model,
    rests_on_disk,
    settle,
    target_path,
    wanted_measures,
)
from llmprune.job.request import Job, Observer, PruneResult
from llmprune.job.safepoints import SafePoints, run_fingerprint
from llmprune.job.shared_sink import SharedSink
from llmprune.job.stop import Stop, Stopped
from llmprune.machine import device_named, peak_memory, placed
from llmprune.model import Loaded, quiet_transformers
from llmprune.pipeline import Pruned, Survey, prune_layers, survey_model
from llmprune.walk.mapped import mapped

__all__ = ["run"]


def run(
    job: Job, observer: Observer | None = None, *, stop: Stop | None = None, team: Team | None = None
) -> PruneResult:
    """Do the job. See the top of this file for the order, and `Job` for what it takes.

    With `stop`, signals that it hears let the layer at hand finish, and are raised then. Without a `team` the
    environment tells whether this is one of several processes: all load, survey and prune, each its share; rank 0 does
    the rest and is the only one that the observer hears of, and the others wait.
    """
    several: AbstractContextManager[Team] = team_from_environment() if team is None else nullcontext(team)
    with several as together:
        return _Run(job, observer if observer and together.leads else Observer(), stop, together).go()


class _Run:
    """One job under way: what it knows so far, stage by stage."""

    def __init__(self, job: Job, observer: Observer, stop: Stop | None, team: Team) -> None:
        self.job, self.observer, self.stop, self.team = job, observer, stop, team
        self.config, self.evaluation = job.config, job.evaluation
        self.origin: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.dense_bytes: int | None = None
        self.destination: Destination | None = None
        self.hollow = False
        self.measures, self.before, self.digests = Measures(Wanted()), Measured(()), dict[str, str]()
        self.device = device_named(job.device, place=team.place if team.size > 1 else None)
        path = target_path(job)
        self.partial = Partial(path) if path is not None else None
        team.safe = lambda: self.partial.told if self.partial is not None else ""

    def go(self) -> PruneResult:
        self.destination = self.team.decided(lambda: check_early(self.job, self.team))
        if self.partial is None:
            return self._go()
        try:
            return self._go()
        except LlmpruneError as error:
            error.args = (" ".join(filter(None, (str(error), self.partial.told))), *error.args[1:])
            raise
        except Stopped as stopped:
            stopped.safe = self.partial.told
            raise
        finally:
            self.partial.tidy(own_only=not self.team.leads)

    def _go(self) -> PruneResult:
        with self._stage("load"):
            loaded = self._load()
            settled = self.team.decided(lambda: settle(self.job, loaded, self.device, self.observer.say))
            self.config, self.evaluation, target = settled.config, settled.evaluation, settled.target
            self.notes += [*loaded.notes, *check_generation_config(loaded.model)]
        with self._stage("read texts"):
            windows, self.origin = self.team.decided(lambda: calibration(self.job, self.config, loaded))
            self.team.decided(lambda: self._read_evaluation(loaded))
        with self._stage("survey"):
            survey = survey_model(loaded.model, windows, self.config, device=self.device)
            require_same_model(self.team, loaded, survey)
            self.team.decided(lambda: self._open(loaded, windows))
        self.team.decided(lambda: self._evaluate_dense(loaded))
        with self._stage("prune"):
            pruned = self._prune(loaded, windows, survey)
        result = self.team.decided(lambda: replace(self._conclude(loaded, pruned, target), model=None, tokenizer=None))
        return replace(result, model=None if self.hollow else loaded.model, tokenizer=loaded.tokenizer)

    def _load(self) -> Loaded:
        job, say, neighbours = self.job, self.observer.say, self.team.neighbours
        if self.partial is None or not self.team.decided(lambda: rests_on_disk(job, say, neighbours=neighbours)):
            return load_model(job)
        self.hollow = True
        return load_model(job, rest_on_disk=self.partial.converted)

    def _read_evaluation(self, loaded: Loaded) -> None:
        wanted = wanted_measures(self.evaluation, self.config, loaded)
        self.measures = Measures(wanted, self.observer.evaluated)
        for written, corpus in zip(self.evaluation.eval_dataset, wanted.corpora, strict=True):
            same = written == self.config.dataset and corpus.name == self.origin["name"]
            if same or _are_one_file(written, self.config.dataset):
                self.notes.append(
                    f"perplexity is measured on {corpus.name}, the text that the calibration windows were drawn from: "
                    "it flatters the pruned model"
                )

    def _open(self, loaded: Loaded, windows: torch.Tensor) -> None:
        """Look for an earlier run's safe points, now that it is known what run this is."""
        self.digests = fingerprint(loaded.model)
        if self.team.size > 1:
            self.notes.append(f"pruned by {self.team.size} processes")
        if self.partial is None:
            return
        parts = run_fingerprint(self.digests, windows, self.config, self.device, self.job.dtype)
        self.partial.open(parts, resume=self.job.resume == "auto")
        if self.partial.layers:
            self.observer.say(f"Going on from a safe point: {self.partial.told.partition(':')[0]}.")
            self.notes.append(f"went on from a safe point after layer {self.partial.committed}")

    def _evaluate_dense(self, loaded: Loaded) -> None:
        self.before = self._evaluate("evaluate dense", loaded, self.measures.dense)

    def _prune(self, loaded: Loaded, windows: torch.Tensor, survey: Survey) -> Pruned:
        """Prune, with safe points if there is an output beside which they can lie."""
        settings: dict[str, Any] = {"device": self.device, "watcher": self.observer, "survey": survey}
        settings |= {"team": self.team, "keep": self._keep()}
        if self.partial is None:
            return prune_layers(loaded.model, windows, self.config, **settings)
        points = SafePoints(self.partial, survey.decoder, every=self.job.safe_points, stop=self.stop)
        sink = points if self.team.size == 1 else SharedSink(self.team, points, self.stop)
        if self.stop is not None:  # rank 0 knows whether it is worth waiting for; the others wait for it
            leads, lost = self.team.leads, self.team.lost
            self.stop.patient = lambda: (points.worthwhile or not leads) and not lost.is_set()
        try:
            return prune_layers(loaded.model, windows, self.config, sink=sink, **settings)
        except Stopped:
            if self.team.leads and points.worthwhile and not self.hollow:
                points.flush()
            raise
        finally:
            if self.stop is not None:
                self.stop.patient = lambda: False

    def _keep(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Where hidden states wait for the next layer."""
        if self.job.activations_dir is None:
            return torch.Tensor.cpu if self.hollow else None
        folder = Path(self.job.activations_dir)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            with write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                return mapped(tensor, folder)

        return keep

    def _conclude(self, loaded: Loaded, pruned: Pruned, target: Path | None) -> PruneResult:
        """From the pruned model in memory to the end of the run."""
        report = self._report(loaded, pruned)
        if target is not None:
            with self._stage("save and verify"), quiet_transformers():
                report = self._save(loaded, report, target)
            assert self.partial is not None
            self.partial.spend()
        try:
            return self._finish(loaded, report, target)
        except KeyboardInterrupt as interrupt:
            raise Stopped(getattr(interrupt, "code", 130), saved=str(target or "")) from None
        except HubError:
            raise  # says itself where the model is
        except LlmpruneError as error:
            if target is not None:
                error.args = (f"{error} The pruned model was saved before, in {target}.", *error.args[1:])
            raise
        finally:
            if self.partial is not None:
                self.partial.remove()

    def _finish(self, loaded: Loaded, report: Report, target: Path | None) -> PruneResult:
        """What comes after the model is safe: the second evaluation and the push."""
        after = self._evaluate("evaluate pruned", loaded, self.measures.against)
        report = replace(
            report,
            after=after.plain_rows(),
            generations=after.plain_generations(),
            notes=(*report.notes, *after.notes),
            seconds=dict(self.seconds),
            peak_memory_bytes=peak_memory(self.device),
        )
        if target is not None:
            report = self._describe(report, target)
        model = None if self.hollow else loaded.model
        result = PruneResult(model, loaded.tokenizer, report, target, dense_bytes=self.dense_bytes)
        if target is None or self.destination is None:
            return result
        try:
            with self._stage("push"):
                pushed = push(target, self.destination, say=self.observer.say)
                return replace(result, url=pushed.url, commit=pushed.commit)
        except HubError as error:
            error.result = result
            raise

    def _describe(self, report: Report, target: Path) -> Report:
        """Report, card and page, now that all is measured. Without a page the rest goes on, and the report says so."""
        from llmprune.report.page import page_trouble  # brings matplotlib, which nothing before this point needs

        try:
            _replace_report(report, target)
            if (trouble := page_trouble(target)) is not None:
                self.observer.say(f"{trouble}.")
                report = replace(report, notes=(*report.notes, trouble))
                _replace_report(report, target)
            write_card(target, report, name=self._card_name(target))
        except OSError as error:
            raise UserError(f"The report could not be finished: {error}.") from error
        return report

    def _evaluate(self, stage: str, loaded: Loaded, measure: Callable[[Any, Any], Measured]) -> Measured:
        if not self.evaluation.asks_for_something:
            return Measured(())
        with self._stage(stage), nullcontext(True) if self.hollow else placed(loaded.model, self.device) as there:
            if not there:
                self.observer.say(f"The whole model does not fit on {self.device}: evaluated where it is.")
                self.notes.append(f"{stage}: the whole model did not fit on {self.device}")
            return measure(loaded.model, loaded.tokenizer)

    def _report(self, loaded: Loaded, pruned: Pruned) -> Report:
        tensors = describe_tensors(loaded.model, pruned.weights, before=self.digests, adjusted=pruned.adjusted)
        return Report(
            versions=tool_versions(self.device),
            command=self.job.command or command_line(),
            config={**asdict(self.config), **asdict(self.evaluation), "dtype": self.job.dtype},
            source=self._source(loaded),
            pruned=tuple(pruned.weights),
            skipped=tuple(pruned.skipped),
            tuned=tuple(pruned.tuned),
            totals=totals(pruned.weights, tensors),
            tensors=tensors,
            ties=saved_ties(loaded.model),
            before=self.before.plain_rows(),
            seconds=dict(self.seconds),
            peak_memory_bytes=peak_memory(self.device),
            notes=(*self.notes, *pruned.notes),
            created=now(),
            model=describe_model(loaded.model, loaded.base_name),
        )

    def _source(self, loaded: Loaded) -> dict[str, Any]:
        card = read_base_card(loaded.directory, hub_id=loaded.name if loaded.revision is not None else None)
        return {"id": loaded.name, "revision": loaded.revision, "calibration": self.origin, "card": card}

    def _card_name(self, target: Path) -> str:
        """What the card tells people to load."""
        return target.name if self.destination is None else self.destination.repo_id

    def _save(self, loaded: Loaded, report: Report, target: Path) -> Report:
        with publish(target, overwrite=self.job.overwrite) as directory:
            if self.job.format == "dense":
                report = self._write_and_prove(loaded, report, directory)
            else:
                dense = directory / ".dense"
                dense.mkdir()
                report = self._pack(dense, directory, self._write_and_prove(loaded, report, dense))
            write_card(directory, report, name=self._card_name(target))
            return report

    def _pack(self, dense: Path, directory: Path, report: Report) -> Report:
        """Pack the proved checkpoint in `dense` into `directory`, prove that too, and remove `dense`."""
        done = pack_files(dense, directory)
        shutil.rmtree(dense)
        if not done.patterns:
            note = "no weight has enough zeros to become smaller, so the checkpoint was saved dense"
            report = replace(report, notes=(*report.notes, note))
            report.write(directory)
            return report
        # The dense files were loaded by transformers already, and these are read back tensor by tensor.
        verify(directory, reload=not self.hollow, trust_remote_code=self.job.trust_remote_code).raise_if_failed()
        self.dense_bytes = done.before
        return report

    def _write_and_prove(self, loaded: Loaded, report: Report, directory: Path) -> Report:
        provenance = {
            "llmprune_version": llmprune.__version__,
            "model": loaded.name,
            "revision": loaded.revision,
            **report.config,
        }
        probe = take_probe(loaded.model)
        carried = write(
            loaded.model,
            loaded.tokenizer,
            directory,
            source=loaded.directory,
            max_shard_size=self.job.max_shard_size,
            provenance=provenance,
        )
        report = replace(report, tensors={**report.tensors, **carried.tensors}, notes=(*report.notes, *carried.notes))
        report.write(directory)
        proof = verify(
            directory,
            probe=probe,
            trust_remote_code=self.job.trust_remote_code,
            rest_on_disk=self.partial.converted if self.partial is not None and self.hollow else None,
        )
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


def _replace_report(report: Report, directory: Path) -> None:
    """Write the finished report over the one that was saved with the model, in one step."""
    scratch = directory / ".report"
    scratch.mkdir(exist_ok=True)
    report.write(scratch).replace(directory / REPORT)
    scratch.rmdir()


def _are_one_file(one: str, other: str) -> bool:
    paths = [Path(written).expanduser() for written in (one, other)]
    return all(path.is_file() for path in paths) and paths[0].samefile(paths[1])
