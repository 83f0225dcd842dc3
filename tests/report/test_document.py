"""The document: its JSON Schema says of it what is true, docs/report.md says the same, and old ones stay readable."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from llmprune.checkpoint.layout import SavedWeight
from llmprune.checkpoint.report import Report, TensorRecord
from llmprune.report.document import REPORT, SCHEMA, json_schema
from llmprune.results import PrunedWeight, SkippedWeight, TunedPart
from tests.report.documents import document, first_schema
from tests.report.schema_table import tables


def test_the_schema_is_valid_and_bears_its_number() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"]["const"] == SCHEMA
    assert schema["$id"] == f"urn:llmprune:report:{SCHEMA}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Report, None),
        (PrunedWeight, "pruned"),
        (SkippedWeight, "skipped"),
        (TunedPart, "tuned"),
        (SavedWeight, "place"),
        (TensorRecord, "tensor"),
    ],
)
def test_the_schema_has_every_field_that_the_code_writes(kind: Any, name: str | None) -> None:
    held = json_schema() if name is None else json_schema()["$defs"][name]
    written = {field.name for field in fields(kind)} | ({"touched"} if kind is TensorRecord else set())
    assert set(held["properties"]) == written == set(held["required"])
    assert held["additionalProperties"] is False


def test_the_schema_sees_what_is_wrong() -> None:
    """So that the tests that validate real reports can fail."""
    validator = Draft202012Validator(json_schema())
    assert not list(validator.iter_errors(document()))
    for path, wrong in [
        (("totals", "zeros"), -1),
        (("pruned", 0, "pattern"), "half"),
        (("pruned", 0, "surprise"), 1),
        (("before", 0, "kind"), "taste"),
        (("after", 0, "divergence", "top1_agreement"), 71.3),
        (("tensors", "lm_head.weight", "sha256"), "0"),
        (("created",), "yesterday"),
    ]:
        broken = document()
        inner: Any = broken
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = wrong
        assert list(validator.iter_errors(broken)), path


def test_the_docs_are_the_schema(repository: Path) -> None:
    lines = (repository / "docs/report.md").read_text(encoding="utf-8").splitlines()
    for name, rows in tables(json_schema()).items():
        start = lines.index(f"## {name}")
        table = [line for line in lines[start + 1 : start + 60] if line.startswith("|")][: len(rows)]
        assert table == rows, f"docs/report.md, {name}: should read\n" + "\n".join(rows)


def test_the_command_prints_the_schema_without_torch(tmp_path: Path) -> None:
    code = "import sys; from llmprune.cli import root; root(['report', '--schema'], standalone_mode=False)\n"
    code += "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json_schema()


def test_a_report_of_schema_1_is_read_as_one_of_today(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(json.dumps(first_schema()))
    report = Report.read(tmp_path)
    assert report.schema == SCHEMA
    assert report.before[0]["kind"] == "perplexity"
    assert (report.generations, report.model, report.created) == ((), {}, "")
    report.write(tmp_path)
    Draft202012Validator(json_schema()).validate(json.loads((tmp_path / REPORT).read_text()))
