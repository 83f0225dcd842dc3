"""The report as a document: the names of its file and its page, the number of its schema, and how it is read.

The schema itself is `llmprune_report.schema.json` beside this file (JSON Schema 2020-12), explained in docs/report.md.
Its number rises when a field is added or changes its meaning. Older documents stay readable; of a newer one the reader
says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llmprune
from llmprune.errors import UserError

__all__ = ["PAGE", "REPORT", "SCHEMA", "Run", "damage_told", "foreign", "json_schema", "read_document", "read_run"]

REPORT = "llmprune_report.json"
PAGE = "report.html"
SCHEMA = 2

_ALWAYS = {"versions", "command", "config", "source", "pruned", "skipped", "totals", "tensors", "ties"}
"""What a report of any schema holds."""


def read_document(directory: Path) -> dict[str, Any]:
    """The document in `directory`, as it stands there.

    Raises
    ------
    UserError
        if there is none, or it is not ours, or a newer llmprune wrote it.
    """
    path = directory / REPORT
    if not path.is_file():
        raise UserError(f"{directory} holds no {REPORT}: give a checkpoint that llmprune saved.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise foreign(path) from error
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(
            f"{path} has schema {schema}; llmprune {llmprune.__version__} reads up to schema {SCHEMA}: update llmprune."
        )
    if not document.keys() >= _ALWAYS:
        raise foreign(path)
    return dict(document)


def foreign(path: Path) -> UserError:
    """The error of a file that is no report."""
    return UserError(f"{path} is not a report of llmprune, or it is damaged: save the model again to get a new one.")


@dataclass(frozen=True)
class Run:
    """A document and what its directory adds to it.

    directory : where it was read
    saved_bytes : of the files with weights beside it; None where there are none
    """

    directory: Path
    document: Mapping[str, Any]
    saved_bytes: int | None


def read_run(directory: Path) -> Run:
    """The run whose report lies in `directory`. Raises UserError as `read_document` does."""
    sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
    return Run(directory, read_document(directory), sum(sizes) if sizes else None)


@contextmanager
def damage_told(run: Run) -> Iterator[None]:
    """What is missing in a document, or of another kind than it should be, becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise foreign(run.directory / REPORT) from error


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the document."""
    text = Path(__file__).with_name("llmprune_report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
