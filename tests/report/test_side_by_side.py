"""Several runs in one page: what may stand beside what, and in which settings they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmprune.cli import root
from llmprune.errors import UserError
from llmprune.report.document import REPORT, Run
from llmprune.report.side_by_side import comparison_page
from tests.report.documents import document, first_schema
from tests.report.test_page import SCRIPT, Reader


def compare(**held: dict[str, Any]) -> str:
    return comparison_page([Run(Path("runs") / name, each, None) for name, each in held.items()])


def other(value: float, **config: Any) -> dict[str, Any]:
    held = document()
    held["after"][0]["value"] = value
    held["config"] |= config
    return held


def test_runs_of_one_model_share_its_dense_row_and_show_what_differs() -> None:
    text = Reader(compare(one=document(), two=other(20.0, method="sparsegpt", seed=3))).text
    assert "tiny, pruned in 2 ways" in text
    assert text.count("tiny, dense 10.00 ± 0.50 40.0% ± 1.0 ") == 1
    assert "one 12.50 ± 0.50 80.0%" in text
    assert "two 20.00 ± 0.50 50.0%" in text
    assert "setting one two method wanda sparsegpt seed 0 3" in text


def test_what_a_run_writes_has_its_colour() -> None:
    page = compare(one=document(), two=document())
    for index, name in enumerate(("one", "two")):
        assert f'style="border-top-color: var(--run-{index}); border-top-style: solid"><b>{name}</b>' in page


def test_numbers_of_two_protocols_stand_in_two_columns() -> None:
    longer = document()
    for when in ("before", "after"):
        longer[when][0]["protocol"] = "a text: 4 windows of 512 tokens; float32 model."
    text = Reader(compare(one=document(), two=longer)).text
    assert "a text perplexity 1" in text
    assert "a text perplexity 3" in text


def test_models_of_other_depth_and_old_reports_stand_beside_each_other() -> None:
    deep = document(layers=12)
    deep["model"]["name"] = "deeper"
    text = Reader(compare(small=document(), deep=deep, old=first_schema())).text
    assert "3 pruned models" in text
    assert "11 n/a 1.20 n/a" in text  # the table behind the curves, last layer
    assert "deeper, dense" in text


def test_runs_without_evaluation_are_compared_by_their_errors() -> None:
    bare = document() | {"before": [], "after": [], "generations": []}
    text = Reader(compare(one=bare, two=bare)).text
    assert "Nothing was measured" in text
    assert "What they write" not in text


def test_whatever_a_report_holds_is_text() -> None:
    held = other(11.0, dataset=SCRIPT)
    held["model"]["name"] = held["command"] = held["generations"][0]["pruned"] = held["before"][0]["dataset"] = SCRIPT
    page = compare(**{SCRIPT: held, "two": document()})
    assert "<script" not in page
    assert Reader(page).text.count(SCRIPT) > 6


def test_directories_of_one_name_are_told_apart_by_their_parents() -> None:
    runs = [Run(Path(parent) / "out", document(), None) for parent in ("a", "b")]
    assert "a/out" in (text := Reader(comparison_page(runs)).text)
    assert "b/out" in text


def test_too_many_runs_are_refused() -> None:
    with pytest.raises(UserError, match="at most 16 runs; got 17"):
        compare(**{f"run{index}": document() for index in range(17)})


def report(*arguments: str | Path) -> None:
    root(["report", *map(str, arguments)], standalone_mode=False)


def test_the_command_draws_one_page_or_several_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, held in {"one": document(), "two": other(20.0)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / REPORT).write_text(json.dumps(held))
    report("one")
    report("one", "two")
    report("two", "--output", "elsewhere.html")
    assert capsys.readouterr().out.split() == ["one/report.html", "comparison.html", "elsewhere.html"]
    assert "tiny, pruned to 2:4" in Path("one/report.html").read_text()
    assert "pruned in 2 ways" in Path("comparison.html").read_text()
    with pytest.raises(UserError, match="needs the directory"):
        report()
    with pytest.raises(UserError, match="cannot be written"):
        report("one", "--output", tmp_path / "nowhere" / "page.html")
