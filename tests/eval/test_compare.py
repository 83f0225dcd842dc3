"""Checkpoints side by side, as a person asks for them: `llmprune compare` and `llmprune eval --against`."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import llmprune
from llmprune.checkpoint.convert import pack_checkpoint
from llmprune.eval import compare, perplexity
from llmprune.eval.measure import Measured
from llmprune.results import percent_with_error, recovery, told_apart, with_error
from tests.builders import tiny_tokenizer
from tests.eval.small_models import MODELS

TEXT = "\n\n".join(f"the {a} sat on the {b} and saw a {a} run" for a in ("cat", "dog", "hen") for b in ("mat", "roof"))
SMALL = ["--tokens=128", "--seq-len=32", "--device=cpu"]


@dataclass(frozen=True)
class Desk:
    """A folder with a dense model, a pruned one, the same packed, and a text; `report` is the pruned one's."""

    folder: Path
    report: dict[str, Any]

    def __call__(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("compare")
    MODELS["llama"]().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    text = str(folder / "text.txt")
    result = llmprune.prune(
        str(folder / "dense"),
        dataset=text,
        method="wanda",
        num_samples=4,
        seq_len=32,
        eval_dataset=text,
        eval_tokens=128,
        output_dir=folder / "pruned",
        device="cpu",
    )
    pack_checkpoint(folder / "pruned", folder / "packed")
    return Desk(folder, result.report.to_json())


@pytest.mark.slow
def test_compare_tells_of_dense_pruned_and_packed_what_the_job_told(desk: Desk) -> None:
    command = ["-m", "llmprune", "compare", "dense", "pruned", "packed", "--dataset", "text.txt", *SMALL, "--json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=desk.folder, capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["dense: dense", "beside it: pruned", "beside it: packed"]
    dense, pruned, packed = json.loads(done.stdout)["models"]
    assert [each["model"] for each in (dense, pruned, packed)] == ["dense", "pruned", "packed"]
    [before], [after] = desk.report["before"], desk.report["after"]
    [first], [second] = dense["rows"], pruned["rows"]
    assert first["value"] == pytest.approx(before["value"], rel=1e-6)
    assert second["value"] == pytest.approx(after["value"], rel=1e-6)
    for key in ("kl", "kl_standard_error", "top1_agreement", "top1_standard_error"):
        assert second["divergence"][key] == pytest.approx(after["divergence"][key], rel=1e-4), key
    assert second["divergence"]["kl"] > 0.01
    assert packed["rows"][0]["value"] == second["value"]
    assert packed["rows"][0]["divergence"] == second["divergence"]
    assert dense["recovery"] == [100]
    assert pruned["recovery"] == [pytest.approx(100 * first["value"] / second["value"])]
    assert pruned["generations"] == packed["generations"] == desk.report["generations"]
    assert len(desk.report["generations"]) == 2


def ended(main: Any, *arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def test_the_table_has_a_column_for_each(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    names = [desk("dense"), desk("pruned"), desk("packed")]
    assert ended(compare.main, *names, "--dataset", desk("text.txt"), *SMALL) == 0
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in out.splitlines() if line.count("│") == 5}
    assert set(rows) == {"perplexity on text.txt", "KL, nats a token", "top-1 agreement"}
    for cells in rows.values():
        assert cells[1].strip() == cells[2].strip() != cells[0].strip()
    before, after = desk.report["before"][0], desk.report["after"][0]
    dense, pruned = (cell.strip() for cell in rows["perplexity on text.txt"][:2])
    assert dense == with_error(before["value"], before["standard_error"])
    assert pruned.endswith(f"({recovery(before, after):.1f} %)")
    assert "of a perplexity dense / pruned" in out
    assert out.count("prompt: ") == 2


@pytest.mark.parametrize("width", [62, 100])
def test_where_there_is_little_room_names_are_broken_and_not_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        ["perplexity on wikitext2 test", "111.4 ± 17", "320.1 ± 43 (34.8 %)", "119.2 ± 17 (93.4 %)"],
        ["  top-1 agreement", "", "12.55 ± 0.92 %", "34.41 ± 1.34 %"],
    ]
    monkeypatch.setattr(compare, "_rows", lambda _: iter(rows))
    found = [compare.Column(name, Measured(())) for name in ("dense", "a", "b")]
    Console(width=width, file=(written := io.StringIO())).print(compare._table(found, width))
    cells = {cell.strip() for cell in re.split("[│\n]", written.getvalue())}
    assert cells >= {"12.55 ± 0.92 %", "34.41 ± 1.34 %", "111.4 ± 17"}
    assert cells >= ({"320.1 ± 43", "(34.8 %)"} if width == 62 else {"320.1 ± 43 (34.8 %)", rows[0][0]})


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["gpt2", "./a", "b"], ["gpt2", "a", "b"]),
        (["me/gpt2", "a/p", "b/p"], ["me/gpt2", "a/p", "b/p"]),
        (["/x/a/p/", "/y/a/p"], ["x/a/p", "y/a/p"]),
        (["gpt2", "gpt2"], ["gpt2 (1)", "gpt2 (2)"]),
    ],
)
def test_models_of_one_name_are_told_apart(models: list[str], names: list[str]) -> None:
    assert told_apart(models) == names


def test_eval_beside_the_dense_model(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", desk("packed"), "--against", desk("dense"), "--dataset", desk("text.txt"), *SMALL]
    assert ended(perplexity.main, *options, "--logits-memory", "1kB") == 0
    value, kl, top1, tokens, *rest = capsys.readouterr().out.splitlines()
    far = desk.report["after"][0]["divergence"]
    assert f"dense {desk.report['before'][0]['value']:.4g} ±" in value
    assert "recovery" in value
    assert kl == f"KL          {far['kl']:.4g} ± {far['kl_standard_error']:.2g} nats a token"
    assert top1.startswith(f"top-1       {100 * far['top1_agreement']:.2f} ± ")
    assert "124 predicted in 4 windows" in tokens
    assert any(line.startswith("prompt ") for line in rest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-perplexity"], "there is nothing to measure"),
        (["--logits-memory", "lots"], "--logits-memory is a number of bytes with a unit, such as 256MB or 1GiB"),
        (["--dtype", "int3"], "dtype is one of"),
        (["--seq-len", "99"], "--seq-len may be at most 64"),
        (["./nowhere"], "./nowhere does not exist"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    desk: Desk, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    names = [desk("dense"), desk("pruned")]
    assert ended(compare.main, *names, "--dataset", desk("text.txt"), "--tokens=64", *options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("Error: ")
    assert message in lines[-1]
    if options == ["./nowhere"]:
        assert lines[:-1] == []  # before the dense model was loaded


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'llmprune[eval]'")
def test_tasks_stand_in_the_table_too_and_in_a_job(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"text": f"the {a} sat on the {b}"} for a in ("cat", "dog", "hen") for b in "abcdef"]
    (desk.folder / "lambada.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tasks = ["--tasks", "lambada", "--data", str(desk.folder), "--limit", "15"]
    names = [desk("dense"), desk("pruned")]
    assert ended(compare.main, *names, "--dataset", desk("text.txt"), *SMALL, *tasks) == 0
    out = capsys.readouterr().out
    assert "lambada acc" in out
    assert "mean recovery" in out
    report = llmprune.prune(
        desk("dense"),
        dataset=desk("text.txt"),
        method="magnitude",
        num_samples=2,
        seq_len=32,
        eval_tasks=("lambada",),
        eval_data=str(desk.folder),
        device="cpu",
    ).report
    assert [(row["kind"], row["task"], row["items"]) for row in report.after] == [("zero_shot", "lambada", 18)]


def test_recovery_is_of_the_dense_model() -> None:
    assert recovery({"value": 10.0}, {"value": 40.0}) == 25  # a report of schema 1
    assert recovery({"kind": "perplexity", "value": 10.0}, {"kind": "perplexity", "value": 8.0}) == 125
    assert recovery({"kind": "zero_shot", "value": 0.5}, {"kind": "zero_shot", "value": 0.4}) == pytest.approx(80)
    assert recovery({"kind": "zero_shot", "value": 0.0}, {"kind": "zero_shot", "value": 0.4}) is None


def test_errors_are_written_for_people() -> None:
    assert with_error(16.1312, 0.7155) == "16.13 ± 0.72"
    assert with_error(1884.2, 218.3) == "1884 ± 220"
    assert with_error(3.0, None) == "3 ± n/a"
    assert percent_with_error(0.34784, 0.00412) == "34.78 ± 0.41 %"
