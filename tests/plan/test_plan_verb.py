"""`llmprune plan` as a person uses it: of a directory, of a model on the Hub, with a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune.cli import main
from tests.builders import tiny_model, tiny_tokenizer
from tests.loopback.hub import hub

BASE = "openai-community/gpt2"


def save(folder: Path) -> Path:
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(folder: Path, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> Any:
    environment = {**(env or os.environ), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    command = [sys.executable, "-m", "llmprune", "plan", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_plan_of_a_model_on_the_hub_fetches_no_weights(tmp_path: Path) -> None:
    with hub(tmp_path) as server:
        server.add(BASE, save(tmp_path / "base"))
        done = run(tmp_path, "--model", "gpt2", "--sparsity", "2:4", "--num-samples", "4", "--json", env=server.env)
    plan = json.loads(done.stdout)
    assert done.stderr == ""
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert 0 < plan["bytes"]["before"] <= size
    assert plan["bytes"]["dense"] == size
    assert [row["zeros"] for row in plan["weights"] if row["decision"] == "prune"][:2] == [32 * 96 // 2, 32 * 32 // 2]
    assert {row["reason"] for row in plan["weights"] if row["decision"] == "skip"} == {"outside the decoder layers"}
    assert plan["memory"]["peak_bytes"] == max(
        sum(term["bytes"] for term in terms) for terms in plan["memory"]["stages"].values()
    )
    assert plan["time"]["seconds"] == pytest.approx(sum(plan["time"]["stages"].values()))
    assert set(plan["gains"]) == {"transformers", "vLLM", "llama.cpp", "llmprune"}
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


def test_a_plan_is_printed_and_nothing_is_written(tmp_path: Path) -> None:
    source = save(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "run.yaml").write_text("model: model\nsparsity: 0.5\nmethod: wanda\nignore: [c_fc]\n")
    shown = run(tmp_path, "--config", "run.yaml", "--no-eval").stdout
    assert "transformer.h.*.attn.c_attn" in shown
    assert "dense: --ignore" in shown
    assert "evaluate" not in shown
    assert sorted(set(tmp_path.rglob("*")) - {tmp_path / "run.yaml"}) == before
    assert source.is_dir()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "./nowhere"], "./nowhere does not exist"),
        (["--sparsity", "2:5"], "h.0.attn.c_attn.weight has 32 inputs"),
        (["--seq-len", "65"], "--seq-len may be at most 64"),
        (["--ignore", "q_proj"], "--ignore 'q_proj' matches no weight"),
        (["--format", "zip"], "format is one of dense, packed"),
        (["--effort", "best", "--low-memory"], "--low-memory takes a plain checkpoint"),
    ],
)
def test_a_mistake_costs_one_sentence(
    tmp_path: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llmprune", "plan", "--model", "model", *arguments])
    with pytest.raises(SystemExit, check=lambda end: end.code == 2):
        main()
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert expected in " ".join(printed.err.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_the_planned_memory_is_what_is_measured(repository: Path, tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--hidden", "256", "--ffn", "1024", "--vocabulary", "4096", "--threads", "1"]
    command = [sys.executable, str(repository / "scripts" / "bench_memory"), *sizes, "--json", "memory.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads((tmp_path / "memory.json").read_text())["runs"]
    assert measured["planned"]["memory"]["peak_bytes"] == pytest.approx(measured["llmprune"]["peak_bytes"], rel=0.15)
