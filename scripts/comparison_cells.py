"""Rows and cells of a table of compare_methods.

A row is a setting ("wanda", "balanced", "wanda refit=20"). A cell is one measurement: a row on one model, with one
sparsity, one set of calibration windows and one list of evaluation texts; the dense model is a cell too. Cells lie in a
folder, each in a file of its own, and are found again by what decides their numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmprune.checkpoint.provenance import cleaned
from llmprune.config import EFFORTS, PruneConfig, from_mapping
from llmprune.errors import UserError
from llmprune.eval.perplexity import Perplexity
from llmprune.methods import METHODS

__all__ = ["OF_THE_TEXT", "Cell", "Row", "Store", "identity_digest"]

# Rows -----------------------------------------------------------------------------------------------------------------

OF_THE_TEXT = ("dataset", "text_column", "num_samples", "seq_len", "seed")
OF_THE_TABLE = ("sparsity", *OF_THE_TEXT)
"""Settings with an option of their own: a row does not set them."""

KINDS = {f.name: str(f.type).removesuffix(" | None") for f in fields(PruneConfig)}

READERS: dict[str, tuple[str, Any]] = {
    "bool": ("true or false", {"true": True, "false": False}.__getitem__),
    "int": ("a whole number", int),
    "float": ("a number", float),
    "str": ("a word", str),
    "tuple[str, ...]": ("a word, and may be repeated", lambda written: (written,)),
}
"""By the type of a setting: what is allowed, and how it is read."""


@dataclass(frozen=True)
class Row:
    """Settings of `PruneConfig` that are compared with others, and the name by which the table shows them."""

    label: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, written: str) -> Row:
        """Read "wanda", "balanced", "wanda refit=20" or "method=wanda refit=20".

        Raises
        ------
        UserError
            quoting the row, for a name or value that PruneConfig does not take.
        """
        try:
            settings = _settings(shlex.split(written))
            config = from_mapping(PruneConfig, settings)
        except ValueError as error:  # a UserError, or a quote that is not closed
            raise UserError(f"row {written!r}: {error}") from None
        head = str(settings.get("effort") or settings.get("method") or config.effort)
        rest = [name for name in KINDS if name in settings and name not in ("effort", "method")]
        return cls(" ".join([head, *(_written(name, settings[name]) for name in rest)]), settings)

    def config(self, **of_the_table: Any) -> PruneConfig:
        """The whole configuration of a cell."""
        return from_mapping(PruneConfig, {**self.settings, **of_the_table})


def _settings(words: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            name, value = "effort" if word in EFFORTS else "method", word
            if word not in (*EFFORTS, *METHODS):
                from_mapping(PruneConfig, {"method": word})  # says which there are
        if name in OF_THE_TABLE:
            raise UserError(f"{name} is the same for all rows: give --{name.replace('_', '-')}, not a row.")
        read = _read(name, value)
        if name in settings and not isinstance(read, tuple):
            raise UserError(f"{name} is given twice.")
        settings[name] = settings.get(name, ()) + read if isinstance(read, tuple) else read
    return settings


def _read(name: str, value: str) -> Any:
    """The value of a setting, by the setting's type; what is no setting is left to PruneConfig to refuse."""
    if name not in KINDS:
        return value
    if KINDS[name] not in READERS:
        raise UserError(f"{name} ({KINDS[name]}) cannot be written in a row.")
    allowed, reader = READERS[KINDS[name]]
    try:
        return reader(value)
    except (KeyError, ValueError):
        raise UserError(f"{name} is {allowed}; got {value!r}.") from None


def _written(name: str, value: Any) -> str:
    """As it stands in a row: true, not True."""
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{name}={str(one).lower() if isinstance(one, bool) else one}" for one in values)


# Cells ----------------------------------------------------------------------------------------------------------------

SCHEMA = 2
"""1 had wall seconds, which other programs lengthen."""


@dataclass(frozen=True)
class Cell:
    """One measurement. Everything is plain data, as it lies in the file.

    label : of the row
    sparsity, num_samples, seq_len, seed : None where they mean nothing: for the dense model, or a method that looks at
        no text
    identity : what decides the numbers: settings, seed, and digests of weights, calibration and evaluation windows
    seconds, memory : of the pruning: processor seconds (wall seconds of a GPU), bytes on top of what was held before;
        None where they were not measured
    perplexities : in the order of the evaluation texts
    model, calibration : names for people
    made : versions, command, threads, date
    """

    label: str
    sparsity: str | None
    num_samples: int | None
    seq_len: int | None
    seed: int | None
    identity: dict[str, Any]
    seconds: float | None
    memory: int | None
    perplexities: list[Perplexity]
    model: str
    calibration: dict[str, Any] | None
    made: dict[str, Any]

    @property
    def digest(self) -> str:
        """By which the cell is found again."""
        return identity_digest(self.identity)

    @property
    def file_name(self) -> str:
        """Readable, and ending in the digest."""
        windows = f"{self.num_samples}x{self.seq_len}" if self.num_samples else ""
        seed = "" if self.seed is None else f"seed {self.seed}"
        words = " ".join([self.model, self.label, (self.sparsity or "").replace(":", "of"), windows, seed])
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', words).strip('-')[:120]}-{self.digest}.json"

    def to_json(self) -> str:
        """The document, without tokens and home directories: it is published."""
        return json.dumps({"schema": SCHEMA, **cleaned(asdict(self))}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Cell:
        """Read it back. Raises KeyError, TypeError or ValueError where it is none."""
        document = json.loads(text)
        if (schema := document.pop("schema")) != SCHEMA:
            raise ValueError(f"its schema is {schema}, not {SCHEMA}")
        return cls(**{**document, "perplexities": [Perplexity(**each) for each in document["perplexities"]]})


def identity_digest(identity: dict[str, Any]) -> str:
    """16 hexadecimal digits over what decides a cell's numbers."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """A folder of cells; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def all(self) -> list[Cell]:
        """Every cell, in the order in which they were measured."""
        return sorted(map(self._read, self._files("*.json")), key=lambda cell: str(cell.made.get("date")))

    def find(self, identity: dict[str, Any]) -> Cell | None:
        """The cell that was measured under exactly these conditions, whatever its row was called."""
        files = self._files(f"*-{identity_digest(identity)}.json")
        return self._read(files[0]) if files else None

    def keep(self, cell: Cell) -> None:
        """Write the cell's file at once or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f".{cell.file_name}.{os.getpid()}"
        unfinished.write_text(cell.to_json(), encoding="utf-8")
        unfinished.replace(self.folder / cell.file_name)

    def _files(self, pattern: str) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(pattern))

    def _read(self, file: Path) -> Cell:
        try:
            cell = Cell.from_json(file.read_text(encoding="utf-8"))
            if not file.stem.endswith(cell.digest):
                raise ValueError(f"its contents belong to digest {cell.digest}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file} is no cell, or it is damaged ({error}). Remove it to measure it again.") from None
        return cell
