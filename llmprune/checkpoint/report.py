"""The report: what was done to every weight and what every tensor on disk holds, as one JSON file beside the weights.

It is the witness that `verify` asks later, without the source. For a tensor that nobody pruned it keeps the digest
taken *before* the work, so that equal bytes on disk prove it untouched; for a pruned one the digest of what was saved.
It holds no token, no environment and no home directory: people publish it with the model.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import llmprune
from llmprune.checkpoint.layout import SavedWeight, digest, saved_names, saved_tensors, saved_weights
from llmprune.errors import UserError, VerificationError
from llmprune.results import PrunedWeight, SkippedWeight, TunedPart

__all__ = [
    "REPORT",
    "Report",
    "TensorRecord",
    "cleaned",
    "command_line",
    "describe_tensors",
    "pruned_weight",
    "record",
    "tool_versions",
    "totals",
]

REPORT = "llmprune_report.json"
_SCHEMA = 1


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the checkpoint."""

    sha256: str
    """Over dtype, shape and bytes (`layout.digest`)."""
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    """Elements that are zero, −0.0 included."""
    weights: tuple[SavedWeight, ...] = ()
    """The pruned weights that lie in it."""
    carried: bool = False
    """Whether it came from the source past the model, which does not load it."""
    adjusted: bool = False
    """Whether a step of the recipe may have changed it although it was not pruned: a refitted bias."""

    @property
    def touched(self) -> bool:
        """Whether pruning may have changed it."""
        return bool(self.weights) or self.adjusted


@dataclass(frozen=True)
class Report:
    """All of `llmprune_report.json`. Every field is plain data."""

    versions: dict[str, str]
    """As `tool_versions` gives them."""
    command: str
    """As `command_line` gives it, or the Python call."""
    config: dict[str, Any]
    source: dict[str, Any]
    """Where the model came from: "id" and "revision" (the commit, or None for a local directory)."""
    pruned: tuple[PrunedWeight, ...]
    skipped: tuple[SkippedWeight, ...]
    totals: dict[str, int]
    """As `totals` counts them."""
    tensors: dict[str, TensorRecord]
    """By name on disk, as `describe_tensors` finds them."""
    ties: dict[str, str]
    """Tensors that are another one and not stored, as `layout.saved_ties` finds them: name left out → name stored."""
    tuned: tuple[TunedPart, ...] = ()
    """Parts of layers whose kept weights were tuned together."""
    before: tuple[dict[str, Any], ...] = ()
    """Evaluations of the dense model."""
    after: tuple[dict[str, Any], ...] = ()
    """Evaluations of the pruned model."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage."""
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    """By device."""
    notes: tuple[str, ...] = ()
    schema: int = _SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The document, without secrets and home directories."""
        document = cleaned(asdict(replace(self, tensors={})))
        tensors = {name: {**asdict(held), "touched": held.touched} for name, held in self.tensors.items()}
        return {"schema": self.schema, **document, "tensors": tensors}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """Read a document back. Raises KeyError or TypeError where it is not one of ours."""
        fields: dict[str, Any] = dict(document)
        fields["pruned"] = tuple(pruned_weight(row) for row in document["pruned"])
        fields["skipped"] = tuple(SkippedWeight(**{**row, "shape": tuple(row["shape"])}) for row in document["skipped"])
        fields["tuned"] = tuple(TunedPart(**row) for row in document.get("tuned", ()))
        fields["tensors"] = {name: _tensor(row) for name, row in document["tensors"].items()}
        fields |= {name: tuple(document[name]) for name in ("before", "after", "notes")}
        return cls(**fields)

    def write(self, directory: Path) -> Path:
        """Write the document into `directory` and return its path."""
        path = directory / REPORT
        path.write_text(json.dumps(self.to_json(), indent=1, default=str) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, directory: Path) -> Report:
        """The report of the checkpoint in `directory`.

        Raises
        ------
        UserError
            if there is none, or it is not ours, or a newer llmprune wrote it.
        """
        path = directory / REPORT
        if not path.is_file():
            raise UserError(f"{directory} holds no {REPORT}: only checkpoints that llmprune saved can be verified.")
        foreign = f"{path} is not a report of llmprune, or it is damaged: save the model again to get a new one."
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            schema = document["schema"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(foreign) from error
        if isinstance(schema, int) and schema > _SCHEMA:
            raise UserError(
                f"{path} has schema {schema}; llmprune {llmprune.__version__} reads schema {_SCHEMA}: update llmprune."
            )
        try:
            return cls.from_json(document)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(foreign) from error


def record(
    tensor: Tensor, *, weights: tuple[SavedWeight, ...] = (), carried: bool = False, adjusted: bool = False
) -> TensorRecord:
    """Describe a tensor as it lies on disk."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorRecord(digest(tensor), tuple(tensor.shape), dtype, _zeros(tensor), weights, carried, adjusted)


def describe_tensors(
    model: PreTrainedModel,
    pruned: Sequence[PrunedWeight],
    *,
    before: Mapping[str, str],
    adjusted: Collection[str] = (),
) -> dict[str, TensorRecord]:
    """The records of all tensors that `model.save_pretrained` will write.

    `before` is the model's `layout.fingerprint` from before the pruning. Tensors that hold no pruned weight must still
    have those digests, except those parameters that are `adjusted`.

    Raises
    ------
    VerificationError
        if a tensor appeared, disappeared (a tie broken or made) or changed that no pruned weight lies in.
    """
    held, loose = saved_weights(model, pruned), saved_names(model, adjusted)
    records = {
        name: record(tensor, weights=held.get(name, ()), adjusted=name in loose)
        for name, tensor in saved_tensors(model)
    }
    if differing := sorted(records.keys() ^ before.keys()):
        raise VerificationError(
            f"Pruning changed which tensors will be saved ({len(differing)}, first {differing[0]}); a tie may have "
            "been broken. Nothing was saved; please report this."
        )
    changed = [name for name, now in records.items() if not now.touched and now.sha256 != before[name]]
    if changed:
        raise VerificationError(
            f"{len(changed)} tensors changed that were not pruned: {', '.join(changed[:3])}. "
            "Nothing was saved; please report this."
        )
    return records


def totals(pruned: Sequence[PrunedWeight], tensors: Mapping[str, TensorRecord]) -> dict[str, int]:
    """Counts of the whole: weights pruned, their elements and zeros, all parameters and their zeros.

    Tied tensors count once, carried ones not at all.
    """
    own = [held for held in tensors.values() if not held.carried]
    return {
        "pruned_weights": len(pruned),
        "pruned_parameters": sum(row.shape[0] * row.shape[1] for row in pruned),
        "pruned_zeros": sum(row.zeros for row in pruned),
        "parameters": sum(torch.Size(held.shape).numel() for held in own),
        "zeros": sum(held.zeros for held in own),
    }


def tool_versions(device: torch.device) -> dict[str, str]:
    """What ran, and on what."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "llmprune": llmprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device} ({gpu})" if gpu else str(device),
        "cpu": _cpu_model(),
    }


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that was typed: program name and arguments, a token's value left out."""
    given = list(sys.argv if arguments is None else arguments)
    words = [Path(given[0]).name]
    for before, word in pairwise(given):
        words.append("***" if before == "--token" else re.sub(r"^--token=.*", "--token=***", word))
    return shlex.join(words)


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.MULTILINE) if facts.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()


def cleaned(value: Any) -> Any:
    """`value` with tokens and the home directory taken out of every string in it."""
    if isinstance(value, dict):
        return {key: cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(inner) for inner in value]
    if isinstance(value, str | Path):
        text = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", str(value))
        home = str(Path.home())
        return text if home == "/" else re.sub(rf"{re.escape(home)}(?=$|[/\\\s'\"])", "~", text)
    return value


def pruned_weight(row: Mapping[str, Any]) -> PrunedWeight:
    """A row of the report, read back from plain data."""
    return PrunedWeight(**{**row, "shape": tuple(row["shape"]), "notes": tuple(row["notes"])})


def _tensor(row: Mapping[str, Any]) -> TensorRecord:
    fields = {name: value for name, value in row.items() if name != "touched"}
    return TensorRecord(**{**fields, "shape": tuple(row["shape"]), "weights": tuple(map(_saved, row["weights"]))})


def _saved(row: Mapping[str, Any]) -> SavedWeight:
    box = None if row["box"] is None else tuple((start, stop) for start, stop in row["box"])
    return SavedWeight(**{**row, "box": box})
