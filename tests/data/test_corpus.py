"""Texts from files and Python objects, and which column they stand in."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmprune.data import load_corpus
from llmprune.errors import UserError
from tests.builders import tiny_tokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def write_lines(path: Path, rows: list[Any]) -> Path:
    """`rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(source: Any, purpose: str = "calibration", **options: Any) -> list[str]:
    return list(load_corpus(source, purpose=purpose, **options).texts)  # type: ignore[arg-type]


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_bytes("\ufeffOne.\n\nTwo.\n".encode())
    corpus = load_corpus(str(path), purpose="calibration")
    assert corpus.texts == ["One.\n\nTwo.\n"]  # whole, without the byte-order mark
    assert corpus.provenance == {
        "file": "story.txt",
        "rows": 1,
        "characters": 11,
        "sha256": hashlib.sha256(b"One.\n\nTwo.\n").hexdigest(),
    }
    assert texts(path, enough_characters=4) == ["One."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    rows = [{"text": "eins", "body": "one"}, {"text": "zwei", "body": "two"}]
    path = write_lines(tmp_path / name, rows)
    path.write_text(path.read_text() + "\n", encoding="utf-8")  # a blank line is no row
    assert texts(path) == ["eins", "zwei"]
    assert load_corpus(path, purpose="calibration").provenance["file"] == name  # no path of this machine
    assert texts(path, text_column="body") == ["one", "two"]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts(packed) == ["eins", "zwei"]


def test_parquet_and_dataset_objects(tmp_path: Path) -> None:
    columns = {"id": [1, 2, 3], "text": ["a", "", "c"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "", "c"]
    assert texts(datasets.Dataset.from_dict(columns)) == ["a", "", "c"]
    assert texts(["x", "y"]) == ["x", "y"]
    assert texts(("x", "y")) == ["x", "y"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_conversations_go_through_the_chat_template(tmp_path: Path, kind: str) -> None:
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}]
    source: Any = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        source = write_lines(tmp_path / "a.jsonl", rows)
    elif kind == "parquet":
        source.to_parquet(str(tmp_path / "a.parquet"))
        source = tmp_path / "a.parquet"
    assert texts(source, tokenizer=tiny_tokenizer(chat_template=TEMPLATE)) == ["[user]hi[assistant]ho", "[user]hi"]
    with pytest.raises(UserError, match=r"row 1 is a conversation, and .* no chat template"):
        load_corpus(source, purpose="calibration", tokenizer=tiny_tokenizer())


def test_a_template_that_refuses_is_a_user_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}])
    picky = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"row 1: .*roles must alternate"):
        load_corpus(path, purpose="calibration", tokenizer=picky)


def test_a_template_that_takes_other_contents_is_a_user_error(tmp_path: Path) -> None:
    """Contents in parts, which a template for text adds to a string."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": parts}])
    adding = tiny_tokenizer(chat_template="{% for m in messages %}{{ 'user: ' + m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match=r"row 1: .*refuses this conversation"):
        load_corpus(path, purpose="calibration", tokenizer=adding)


def test_the_text_column_is_preferred_over_messages(tmp_path: Path) -> None:
    assert texts(write_lines(tmp_path / "a.jsonl", [{"messages": TURNS, "text": "plain"}])) == ["plain"]


def test_reading_stops_when_there_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{"text": "def"}\nnot JSON\n', encoding="utf-8")
    assert texts(path, enough_characters=4) == ["abc", "def"]  # whole texts, and the third line is never parsed
    assert texts(["abc", "def", "ghi"], enough_characters=3) == ["abc"]


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "malformed": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not valid JSON"),
    "no object": ("a.jsonl", b'["a"]\n', "line 1: a JSON list where an object is needed"),
    "column gone": ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2: no column 'text'; this line has txt"),
    "no column": ("a.jsonl", b'{"body": "a", "id": 1}\n', "no column 'text' or 'messages'; its columns are body, id"),
    "no text": ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2: column 'text' must hold text.*got NoneType"),
    "empty jsonl": ("a.jsonl", b"", "is empty"),
    "empty txt": ("a.txt", b" \n", "a.txt holds no text; calibration needs some"),
    "latin-1": ("a.txt", "é".encode("latin-1"), "is not UTF-8 text"),
    "not gzip": ("a.jsonl.gz", b"hello", "cannot be read"),
    "cut gzip": ("a.txt.gz", gzip.compress(random.Random(0).randbytes(999).hex().encode())[:-20], "cannot be read"),
    "not parquet": ("a.parquet", b"hello", "cannot be read as Parquet"),
    "unknown kind": ("a.pdf", b"hello", r"only \.txt, .* files can be read; got \.pdf"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(tmp_path / name, purpose="calibration")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/a.jsonl", "a.jsonl does not exist"),
        (Path("nowhere"), "nowhere does not exist"),
        (".", r"\. is not a file"),
        ("C4", "did you mean 'c4'"),
        ("wikitext-2", "did you mean 'wikitext2'"),
        ("wikitext", "did you mean 'wikitext2'"),
        ("wikitext-2-raw-v1", "did you mean 'wikitext2'"),
        ("wikitex2", "did you mean 'wikitext2'"),
        ("Salesforce/wikitext", "did you mean 'wikitext2'"),
        ("allenai/c4", "did you mean 'c4'"),
        ("imagenet", r"unknown data set 'imagenet'\. Allowed are c4"),
        ("word " * 1000, "a text itself is given as a list of one string"),
        (["a", 3], "element 1 is int"),
        ([], "holds no text"),
        (3, "cannot read text from int"),
        (torch.zeros(1, 2), "token ids are no text"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})), "Choose one of its splits"),
    ],
)
def test_a_source_that_is_none_says_what_is_allowed(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_corpus(source, purpose="calibration")


@pytest.mark.parametrize("source", [["a"], "demo", "a.txt"])
def test_a_column_of_what_has_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(UserError, match="has no columns: leave --text-column body out"):
        load_corpus(source, purpose="calibration", text_column="body")
