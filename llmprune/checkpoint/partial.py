"""What a run has finished so far, in `OUTPUT.partial/` beside the output: its safe points.

    manifest.json               what run it is, and the rows of the report for every finished layer
    layer-00000.safetensors     a layer's parameters by their names in the model, and its masks where later steps ask
    lock                        held by the system for the run that writes here, whatever becomes of it
    converted-HOST-PID/         weights that transformers converted for a model that rests on disk

A file is written under another name, flushed to the disk and then renamed; the manifest comes last, in the same way. So
whatever the manifest names is whole, wherever the process was killed, and what it does not name does not count. It
holds no hidden states: a run that goes on gets them by running the finished layers, which takes a fraction of the time
that pruning them took, where writing them would take gigabytes for every layer.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor

from llmprune.checkpoint.report import pruned_weight
from llmprune.checkpoint.shards import TensorFile
from llmprune.checkpoint.target import flush_directory, write_errors
from llmprune.errors import UserError
from llmprune.results import PrunedWeight, TunedPart

__all__ = ["MASK", "Partial", "SavedLayer"]

MANIFEST = "manifest.json"
LOCK = "lock"
MASK = "mask/"
"""Stands before the name of a mask among a layer's tensors."""

_SCHEMA = 1


@dataclass(frozen=True)
class SavedLayer:
    """A finished layer as the manifest has it.

    file, nbytes : its tensors, and how long the file is
    weights, tuned, adjusted : as in the report
    """

    file: str
    nbytes: int
    weights: list[PrunedWeight]
    tuned: list[TunedPart]
    adjusted: list[str]


OURS = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(LOCK)}|layer-\d+\.safetensors|.*\.tmp|converted-.*")
"""Names in the directory of safe points. One with any other is not ours to remove."""


class Partial:
    """The directory of safe points that belongs to the output `target`.

    `layers` are the finished ones by index, from the first on without a gap, of which `committed` count.
    """

    def __init__(self, target: Path) -> None:
        self.directory = target.parent / f"{target.name}.partial"
        self._lock = FileLock(self.directory / LOCK)
        self.fingerprint: dict[str, Any] = {}
        self.layers: dict[int, SavedLayer] = {}
        self.committed = 0

    @property
    def converted(self) -> Path:
        """Where this process may put converted weights: other machines may have a process of the same number."""
        return self.directory / f"converted-{platform.node()}-{os.getpid()}"

    @property
    def told(self) -> str:
        """Where the safe point is, in a sentence; empty if there is none."""
        if not self.committed:
            return ""
        count = f"{self.committed} {'layer is' if self.committed == 1 else 'layers are'}"
        return f"{count} safe in {self.directory}: the same command goes on from there."

    def open(self, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Find out what an earlier run left, and make sure that it is this run's; without `resume`, remove it.

        Raises
        ------
        UserError
            if it is another run's, naming what differs, or its manifest is damaged; if that run is still at work.
        """
        self._require_ours()
        self._hold()
        self.fingerprint = json.loads(json.dumps(fingerprint))
        for leftover in self.directory.glob("converted-*"):
            own = re.fullmatch(rf"converted-{re.escape(platform.node())}-(\d+)", leftover.name)
            if own and leftover != self.converted and not psutil.pid_exists(int(own[1])):
                shutil.rmtree(leftover, ignore_errors=True)
        if not resume:
            self._clear()
            return
        manifest = self._manifest()
        if manifest is None:
            return
        if differing := sorted(_differences(manifest["fingerprint"], self.fingerprint)):
            raise UserError(
                f"{self.directory} holds {len(manifest['layers'])} finished layers of another run: "
                f"{'; '.join(differing[:5])}. Run it as it was begun, choose another --output-dir, or start anew with "
                "--resume never, which removes them."
            )
        for index, row in enumerate(manifest["layers"]):
            path = self.directory / row["file"]
            if not path.is_file() or path.stat().st_size != row["nbytes"]:
                break
            self.layers[index] = _saved_layer(row)
        self.committed = len(self.layers)

    def tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a finished layer, masks included."""
        with safe_open(self.path(index), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                yield name, file.get_tensor(name)

    def path(self, index: int) -> Path:
        """The file of a layer."""
        return self.directory / f"layer-{index:05}.safetensors"

    def write(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        *,
        weights: list[PrunedWeight],
        tuned: list[TunedPart],
        adjusted: Iterable[str],
    ) -> None:
        """Write a finished layer; it counts once `commit` has been called.

        Raises
        ------
        UserError
            if the disk is full.
        """
        with self._replacing(self.path(index)) as scratch, TensorFile(scratch, dict(tensors)) as file:
            for name, tensor in tensors.items():
                file.put(name, tensor)
        nbytes = self.path(index).stat().st_size
        self.layers[index] = SavedLayer(self.path(index).name, nbytes, weights, tuned, sorted(adjusted))

    def commit(self) -> None:
        """Make what was written so far the safe point. Raises UserError if the disk is full."""
        manifest = {
            "schema": _SCHEMA,
            "fingerprint": self.fingerprint,
            "layers": [asdict(self.layers[index]) for index in range(len(self.layers))],
        }
        with self._replacing(self.directory / MANIFEST) as scratch:
            scratch.write_text(json.dumps(manifest, default=str), encoding="utf-8")
        self.committed = len(self.layers)

    def spend(self) -> None:
        """The output is in its place, so no run shall go on from here; the files stay for who reads weights there."""
        (self.directory / MANIFEST).unlink(missing_ok=True)
        self.committed = 0

    def remove(self) -> None:
        """Remove the directory and all in it."""
        self.spend()  # first: should this be cut off, the rest does not count
        shutil.rmtree(self.directory, ignore_errors=True)

    def tidy(self, *, own_only: bool = False) -> None:
        """Remove what no later run can use: this process's converted weights, half-written files unless another
        process may be writing them, and the directory if it is empty then."""
        for path in () if own_only or not self._lock.is_locked else self.directory.glob("*.tmp"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.converted, ignore_errors=True)
        if self._lock.is_locked:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()
        with suppress(OSError):
            self.directory.rmdir()

    def _require_ours(self) -> None:
        for path in self.directory.glob("*"):
            if not OURS.fullmatch(path.name):
                raise UserError(
                    f"{self.directory} is where safe points go, and are removed, but holds {path.name}, which is none: "
                    "move it away, or choose another --output-dir."
                )

    def _hold(self) -> None:
        with write_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise UserError(
                    f"another run is at work on this output, and has its safe points in {self.directory}: "
                    "wait for its end, or choose another --output-dir."
                ) from None
            except NotImplementedError:  # a file system without locks keeps nobody away
                return

    def _clear(self) -> None:
        self.spend()
        for path in self.directory.glob("*"):
            if path.is_file() and path.name != LOCK:
                path.unlink()

    def _manifest(self) -> dict[str, Any] | None:
        path = self.directory / MANIFEST
        if not path.is_file():
            return None
        damaged = f"{path} is damaged, so the run cannot go on: start anew with --resume never, which removes it."
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = manifest["schema"] == _SCHEMA
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(damaged) from error
        if not known:
            raise UserError(damaged.replace("is damaged", "is of another release of llmprune"))
        return manifest

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """A scratch file that takes the place of `path` once it is on the disk, or vanishes if it cannot be written."""
        scratch = path.with_suffix(".tmp")
        with write_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                yield scratch
                with scratch.open("rb+") as file:
                    os.fsync(file.fileno())
                scratch.replace(path)
                flush_directory(self.directory)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise


def _saved_layer(row: Mapping[str, Any]) -> SavedLayer:
    weights = [pruned_weight(weight) for weight in row["weights"]]
    tuned = [TunedPart(**part) for part in row["tuned"]]
    return SavedLayer(row["file"], row["nbytes"], weights, tuned, row["adjusted"])


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """One clause for each leaf that differs."""
    for name in {*there, *here}:
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name} was {one!r} and is {other!r}" if len(str(one)) < 64 else f"{prefix}{name} differs"
