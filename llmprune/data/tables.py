"""Rows with named columns, from files and data sets, and which column is the text.

A table is read one column at a time and in the file's own order, lazily: a shard of C4 holds 356 317 documents, of
which calibration needs a thousand.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmprune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Table", "dataset_table", "file_table", "open_text", "texts_of"]


@dataclass(frozen=True)
class Table:
    """Rows with named columns."""

    name: str
    """As errors call it."""
    columns: tuple[str, ...]
    values: Callable[[str], Iterator[Any]]
    """The values of one column, row by row."""


def file_table(path: Path) -> Table:
    """A `.jsonl`, `.json` (one object a line) or `.parquet` file as a table; the first two may be gzipped."""
    return _parquet_table(path) if path.name.lower().endswith(".parquet") else _json_table(path)


def dataset_table(dataset: Dataset, name: str) -> Table:
    """A `datasets.Dataset` as a table."""

    def values(column: str) -> Iterator[Any]:
        # Only one column is decoded: others may hold images.
        for row in dataset.select_columns([column]):
            yield row[column]

    return Table(name, tuple(dataset.column_names), values)


def texts_of(table: Table, text_column: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """The table's texts: the column asked for, else `text`, else `messages` through the tokenizer's chat template.

    Raises
    ------
    UserError
        if there is no such column, or a row holds neither text nor a conversation.
    """
    column = _chosen_column(table, text_column)
    for number, value in enumerate(table.values(column), 1):
        if isinstance(value, str):
            yield value
        elif _is_conversation(value):
            yield _as_chat(value, tokenizer, f"{table.name}, row {number}")
        else:
            raise UserError(
                f"{table.name}, row {number}: column {column!r} must hold text, or a list of "
                f'{{"role", "content"}} messages; got {type(value).__name__}. Choose another one with --text-column.'
            )


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a UTF-8 file, gzipped or not, for reading; what is wrong with it becomes a `UserError`."""
    try:
        # utf-8-sig: a byte-order mark is no part of the text.
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.suffix.lower() == ".gz"
            else path.open(encoding="utf-8-sig")
        ) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it first.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _chosen_column(table: Table, text_column: str | None) -> str:
    for candidate in (text_column,) if text_column is not None else ("text", "messages"):
        if candidate in table.columns:
            return candidate
    wanted = "'text' or 'messages'" if text_column is None else repr(text_column)
    raise UserError(
        f"{table.name} has no column {wanted}; its columns are {', '.join(table.columns) or 'none'}. "
        "Name the one with the text with --text-column."
    )


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )


def _as_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase | None, place: str) -> str:
    """One conversation as the text that the model was trained to see."""
    from jinja2 import TemplateError

    if tokenizer is None or not tokenizer.chat_template:
        raise UserError(
            f"{place} is a conversation, and this model's tokenizer has no chat template to write it out with. "
            "Give a column of plain text with --text-column."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{place}: the tokenizer's chat template refuses this conversation: {error}.") from error


def _json_table(path: Path) -> Table:
    def values(column: str) -> Iterator[Any]:
        for number, record in _json_records(path):
            if column not in record:
                raise UserError(
                    f"{path}, line {number}: no column {column!r}; this line has {', '.join(record) or 'none'}. "
                    "Every line must have it."
                )
            yield record[column]

    _, first = next(_json_records(path), (0, None))
    if first is None:
        raise UserError(f"{path} is empty; it must hold one JSON object a line.")
    return Table(str(path), tuple(first), values)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                    'each line must be one object, such as {"text": "..."}.'
                ) from None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}, line {number}: a JSON {type(record).__name__} where an object is needed; "
                    'each line must be one object, such as {"text": "..."}.'
                )
            yield number, record


def _parquet_table(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}.") from error

    def values(column: str) -> Iterator[Any]:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from batch.column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged: {error}.") from error

    return Table(str(path), tuple(file.schema_arrow.names), values)
