"""The report: what was done to every weight and what every tensor on disk holds, as one JSON file beside the weights.

It is the witness that `verify` asks later, without the source. For a tensor that nobody pruned it keeps the digest
taken *before* the work, so that equal bytes on disk prove it untouched; for a pruned one the digest of what was saved.
It holds no token, no environment and no home directory: people publish it with the model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.checkpoint.layout import SavedWeight, digest, saved_names, saved_tensors, saved_weights
from llmprune.checkpoint.provenance import cleaned
from llmprune.errors import UserError, VerificationError
from llmprune.report.document import REPORT, SCHEMA, foreign, read_document
from llmprune.results import PrunedWeight, SkippedWeight, TunedPart

__all__ = [
    "REPORT",
    "Report",
    "TensorRecord",
    "describe_tensors",
    "pruned_weight",
    "record",
    "totals",
]

_FIRST_MEASURES: dict[str, Any] = {"kind": "perplexity", "versions": {}, "divergence": None}
"""What the evaluations of schema 1 do not say of themselves."""


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
    """All of `llmprune_report.json`. Every field is plain data; docs/report.md explains them to readers of the file."""

    versions: dict[str, str]
    """As `provenance.tool_versions` gives them."""
    command: str
    """As `provenance.command_line` gives it, or the Python call."""
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
    generations: tuple[dict[str, Any], ...] = ()
    """What the dense and the pruned model write after the same prompts."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time by stage."""
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    """By device."""
    notes: tuple[str, ...] = ()
    created: str = ""
    """When the pruning ended, in UTC, as `provenance.now` writes it; empty where that was not recorded."""
    model: dict[str, Any] = field(default_factory=dict)
    """As `provenance.describe_model` gives it."""
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The document, without secrets and home directories."""
        document = cleaned(asdict(replace(self, tensors={})))
        tensors = {name: {**asdict(held), "touched": held.touched} for name, held in self.tensors.items()}
        return {"schema": self.schema, **document, "tensors": tensors}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """Read a document back, an older one as today's. Raises KeyError or TypeError where it is not one of ours."""
        fields: dict[str, Any] = {**document, "schema": SCHEMA}
        fields["pruned"] = tuple(pruned_weight(row) for row in document["pruned"])
        fields["skipped"] = tuple(SkippedWeight(**{**row, "shape": tuple(row["shape"])}) for row in document["skipped"])
        fields["tuned"] = tuple(TunedPart(**row) for row in document.get("tuned", ()))
        fields["tensors"] = {name: _tensor(row) for name, row in document["tensors"].items()}
        for name in ("before", "after", "generations", "notes"):
            fields[name] = tuple(document.get(name, ()))
        if document["schema"] < 2:
            fields |= {name: tuple({**_FIRST_MEASURES, **row} for row in fields[name]) for name in ("before", "after")}
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
        document = read_document(directory)
        try:
            return cls.from_json(document)
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise foreign(directory / REPORT) from error


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


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor))


def pruned_weight(row: Mapping[str, Any]) -> PrunedWeight:
    """A row of the report, read back from plain data."""
    return PrunedWeight(**{**row, "shape": tuple(row["shape"]), "notes": tuple(row["notes"])})


def _tensor(row: Mapping[str, Any]) -> TensorRecord:
    fields = {name: value for name, value in row.items() if name != "touched"}
    return TensorRecord(**{**fields, "shape": tuple(row["shape"]), "weights": tuple(map(_saved, row["weights"]))})


def _saved(row: Mapping[str, Any]) -> SavedWeight:
    box = None if row["box"] is None else tuple((start, stop) for start, stop in row["box"])
    return SavedWeight(**{**row, "box": box})
