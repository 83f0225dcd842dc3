"""The command line as a person uses it: in a subprocess, with its output, exit code and what it leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmprune.cli import main
from llmprune.config import PruneConfig
from tests.builders import tiny_model, tiny_tokenizer

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog",
    "ran",
    "after",
    "a",
    "ball",
    "in",
    "the",
    "garden",
    "behind",
    "the",
    "house",
]


FEW = ["--model", "gpt2", "--dataset", "text.txt", "--num-samples", "6", "--seq-len", "32"]


@dataclass(frozen=True)
class Desk:
    """A working directory with a tiny model and a text, and a way to run llmprune there."""

    folder: Path

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmprune", *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # as a person has it: keeping bars away is our business
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == code, done.stderr
        return done

    def prune(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run(*FEW, "--eval-dataset", "text.txt", "--eval-tokens", "256", *arguments, code=code)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    tiny_model("gpt2").save_pretrained(folder / "gpt2")
    tiny_tokenizer().save_pretrained(folder / "gpt2")
    text = "\n\n".join(" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(30)) for i in range(40))
    (folder / "text.txt").write_text(text)
    return Desk(folder)


@pytest.fixture(scope="module")
def pruned(desk: Desk) -> Path:
    desk.prune("--sparsity", "2:4")
    return desk.folder / "gpt2-alps-2of4"


def one_sentence(out: str, err: str) -> str:
    """The error of a run, which must be one line without a traceback and nothing on standard output."""
    assert "Traceback" not in err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, err
    return errors[0]


def test_the_whole_job(desk: Desk, pruned: Path) -> None:
    assert (pruned / "llmprune_report.json").exists()
    report = json.loads((pruned / "llmprune_report.json").read_text())
    assert report["totals"]["pruned_weights"] == 8
    assert report["before"][0]["value"] > 0
    assert report["after"][0]["tokens"] == 8 * 31
    assert set(report["seconds"]) >= {"load", "prune", "save and verify", "evaluate dense", "evaluate pruned"}
    for name, tensor in load_file(pruned / "model.safetensors").items():
        if ".h." in name and tensor.ndim == 2:
            assert ((tensor.T == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name


def test_progress_goes_to_standard_error_and_the_result_to_standard_output(desk: Desk) -> None:
    done = desk.prune("--method", "wanda", "--output-dir", "shown")
    assert "layer 2/2  c_attn 0." in done.stderr
    assert "left" in done.stderr
    assert "\x1b[" not in done.stderr + done.stdout  # no colours, no bars: this is no terminal
    for expected in ("perplexity", "dense", "pruned", "±", "50.00% of the pruned weights", "peak memory", "verified"):
        assert expected in done.stdout
    for expected in ("KL from dense", "top-1 agreement", "recovery", "prompt  'The capital of France is'"):
        assert expected in done.stdout
    assert "tokenised once" in " ".join(done.stdout.split())
    assert "as large and run as fast as the dense" in " ".join(done.stdout.split())


def test_json_is_the_report_and_quiet_is_silent(desk: Desk) -> None:
    done = desk.prune("--json", "--quiet", "--output-dir", "as-json", "--no-eval", "--method", "magnitude")
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    assert printed == json.loads((desk.folder / "as-json" / "llmprune_report.json").read_text())
    assert printed["before"] == printed["after"] == []
    silent = desk.prune("--quiet", "--overwrite", "--output-dir", "as-json", "--no-eval")
    assert silent.stdout + silent.stderr == ""


def test_verify_passes_and_then_finds_a_changed_byte(desk: Desk, pruned: Path) -> None:
    done = desk.run("verify", pruned.name)
    assert "is what its report says" in done.stdout
    assert done.stderr == ""
    copy = desk.folder / "spoilt"
    subprocess.run(["cp", "-r", str(pruned), str(copy)], check=True)
    shard = copy / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    done = desk.run("verify", "spoilt", "--json", code=1)
    assert json.loads(done.stdout)["ok"] is False
    assert "differs from what was" in done.stdout


def test_eval_prints_the_number_of_the_report(desk: Desk, pruned: Path) -> None:
    after = json.loads((pruned / "llmprune_report.json").read_text())["after"][0]
    arguments = ["--model", pruned.name, "--dataset", "text.txt", "--tokens", "256", "--seq-len", "32", "--json"]
    [row] = json.loads(desk.run("eval", *arguments).stdout)["rows"]
    assert row["value"] == pytest.approx(after["value"], rel=1e-6)


def test_the_config_of_a_pruned_model_repeats_its_run(desk: Desk, pruned: Path) -> None:
    desk.run("--config", f"{pruned.name}/config.json", "--output-dir", "again", "--no-eval", "--quiet")
    assert (desk.folder / "again/model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], {"effort": "balanced", "method": "alps", "permute": True}),
        (["--effort", "fast"], {"effort": "fast", "method": "alps", "permute": False, "refit": 3}),
        (["--method", "wanda"], {"effort": None, "method": "wanda", "permute": False}),
        (["--sparsity", "0.5"], {"effort": "balanced", "method": "alps", "permute": False, "sparsity": "50%"}),
    ],
)
def test_what_is_typed_beside_an_earlier_runs_config_is_done(
    typed: list[str], expected: dict[str, Any], desk: Desk, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An effort makes settings, which stand in the config too; they must not outlive it."""
    config = planned(["--config", f"{pruned.name}/config.json", *typed], desk, monkeypatch)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.num_samples == 6


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("ignore: c_fc", {"ignore": ("c_fc",)}),
        ("overrides:\n  c_fc: 4:8\n  c_proj: dense", {"overrides": ("c_fc=4:8", "c_proj=dense")}),
        ("overrides: c_fc=4:8", {"overrides": ("c_fc=4:8",)}),
        ("overrides: {c_fc: }", {"overrides": ("c_fc=dense",)}),
        ("num-samples: 7\nno_eval: true\neval_tasks: piqa", {"num_samples": 7}),
        ("output_dir: out\npush_to_hub: true\nseed: 3", {"seed": 3}),
    ],
)
def test_a_yaml_file_may_hold_what_a_person_would_write(
    written: str, expected: dict[str, Any], desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: gpt2\nsparsity: 2:4\njson: true\n{written}\n")
    config = planned(["--config", str(tmp_path / "run.yaml")], desk, monkeypatch)
    assert {name: getattr(config, name) for name in expected} == expected


def test_an_effort_that_is_typed_goes_before_a_files_method(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before all that the method of an earlier run had set."""
    earlier = asdict(PruneConfig(sparsity="2:4", method="wanda", num_samples=6))
    (tmp_path / "config.json").write_text(json.dumps({"llmprune_config": earlier}))
    (tmp_path / "run.yaml").write_text("sparsity: 2:4\nmethod: wanda\nnum_samples: 6\n")
    for file in ("config.json", "run.yaml"):
        typed = ["--model", "gpt2", "--config", str(tmp_path / file), "--effort", "balanced"]
        found = planned(typed, desk, monkeypatch)
        assert found == PruneConfig(sparsity="2:4", effort="balanced", num_samples=6)


def planned(typed: list[str], desk: Desk, monkeypatch: pytest.MonkeyPatch) -> PruneConfig:
    """The settings that reach a plan."""
    seen: list[PruneConfig] = []
    monkeypatch.setattr("llmprune.plan.verb.forecast", lambda request: seen.append(request.config) or sys.exit(0))
    monkeypatch.chdir(desk.folder)
    monkeypatch.setattr(sys, "argv", ["llmprune", "plan", *typed])
    with pytest.raises(SystemExit, check=lambda end: end.code == 0):
        main()
    return seen[0]


@pytest.mark.parametrize(
    ("file", "written", "expected"),
    [
        ("run.yaml", "push_to_hub: false", None),
        ("run.yaml", "push_to_hub: no", None),
        ("run.yaml", "push_to_hub: true", ""),
        ("run.yaml", "push_to_hub: me/model", "me/model"),
        ("run.json", '{"push_to_hub": false}', None),
        ("run.json", '{"push_to_hub": true}', ""),
    ],
)
def test_whether_to_push_can_stand_in_a_file(
    file: str, written: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`false` must not push to a repository of that name."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("llmprune.cli._prune", seen.append)
    (tmp_path / file).write_text(written)
    monkeypatch.setattr(sys, "argv", ["llmprune", "--model", "gpt2", "--config", str(tmp_path / file)])
    main()
    assert seen[0]["push_to_hub"] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["./gpt2"], "No such command './gpt2'. A model is given as --model ./gpt2"),
        (["verfy"], "No such command 'verfy'. Did you mean 'verify'?\n"),
        (["eval", "./gpt2"], "Missing option '--model'. A model is given as --model ./gpt2"),
        (["plan", "./gpt2"], "unexpected extra argument (./gpt2). A model is given as --model ./gpt2"),
        (["eval", "--data", "a/b"], "Missing option '--model'.\n"),
        (
            ["--sparsity", "50%", "plan", "--model", "gpt2"],
            "--sparsity stands before plan, which does not see it there",
        ),
        (["--config", "half.json"], "half.json: num_samples is a whole number; got 64.5."),
        (["--config", "true.json"], "true.json: budget is a number; got true."),
        (["--config", "list.json"], 'list.json: dataset takes one value; got ["a", "b"].'),
        (["plan", "--config", "typo.yaml"], "sets sparsty, which is no option; did you mean sparsity?"),
        (["plan", "--config", "torn.yaml"], "neither JSON nor YAML (line 2: "),
        (["plan", "--config", "empty.json"], "empty.json holds no settings"),
    ],
)
def test_what_is_nearly_right_is_told_the_cure(
    arguments: list[str],
    expected: str,
    desk: Desk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").symlink_to(desk.folder / "gpt2")
    (tmp_path / "typo.yaml").write_text("sparsty: 2:4\n")
    (tmp_path / "torn.yaml").write_text("model: [demo\nignore: x\n")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "half.json").write_text('{"num_samples": 64.5}')
    (tmp_path / "true.json").write_text('{"budget": true}')
    (tmp_path / "list.json").write_text('{"dataset": ["a", "b"]}')
    monkeypatch.setattr(sys, "argv", ["llmprune", *arguments])
    with pytest.raises(SystemExit, check=lambda end: end.code == 2):
        main()
    assert expected in capfd.readouterr().err


def test_options_from_a_yaml_file_and_typed_ones_before_them(desk: Desk) -> None:
    (desk.folder / "run.yaml").write_text("model: gpt2\nsparsity: 2:4\nmethod: wanda\nnum-samples: 4\nignore: [c_fc]\n")
    common = ["--dataset", "text.txt", "--seq-len", "32", "--no-eval", "--json", "--quiet", "--output-dir", "yaml"]
    report = json.loads(desk.run("--config", "run.yaml", "--num-samples", "3", *common).stdout)
    assert report["config"]["sparsity"] == "2:4"
    assert report["config"]["num_samples"] == 3
    assert sum(row["reason"] == "--ignore" for row in report["skipped"]) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sparsity", "3"], "If you meant 3 %, write 3%"),
        (["--sparsity", "4:2"], "0 < N < M"),
        (["--sparsity", "half"], "N kept of every M (2:4); got 'half'"),
        (["--sparsity", "2:5"], "h.0.attn.c_attn.weight has 32 inputs"),
        (["--method", "wand"], "did you mean 'wanda'?"),
        (["--ignore", "q_proj"], "--ignore 'q_proj' matches no weight"),
        (["--ignore", "re:("], "is no regular expression"),
        (["--num-samples", "5000"], "are missing. Lower --num-samples or --seq-len"),
        (["--num-samples", "0"], "num_samples is a whole number, at least 1"),
        (["--seq-len", "65"], "--seq-len may be at most 64"),
        (["--dataset", "none.txt"], "none.txt"),
        (["--device", "tpu9"], "--device tpu9 cannot be used"),
        (["--dtype", "int8"], "dtype is one of auto, float32, bfloat16, float16"),
        (["--output-dir", "gpt2"], "gpt2"),
        (["--output-dir", "text.txt"], "text.txt"),
        (["--model", "./nowhere"], "./nowhere does not exist"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--on-indivisible", "maybe"], "error, skip"),
        (["--block-size", "0"], "block_size"),
        (["--max-shard-size", "lots"], "a size such as 5GB or 500MB; got 'lots'"),
        (["--max-shard-size", "0GB"], "a size such as 5GB or 500MB; got '0GB'"),
    ],
)
def test_a_mistake_costs_one_sentence_and_exit_code_2(
    desk: Desk, arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, to save an import of torch for each; the next test makes one mistake as a user would."""
    monkeypatch.chdir(desk.folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    before = sorted(path.name for path in desk.folder.iterdir())
    sys.argv = ["llmprune", *FEW, "--output-dir", "never", *arguments, "--quiet", "--no-eval"]
    with pytest.raises(SystemExit, check=lambda end: end.code == 2):
        main()
    printed = capfd.readouterr()
    assert expected in one_sentence(printed.out, printed.err)
    assert sorted(path.name for path in desk.folder.iterdir()) == before


def test_an_existing_output_is_kept_unless_overwrite_is_said(desk: Desk, pruned: Path) -> None:
    stamp = (pruned / "model.safetensors").stat().st_mtime_ns
    done = desk.prune("--quiet", code=2)
    assert "--overwrite" in one_sentence(done.stdout, done.stderr)
    assert (pruned / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--num-samples", "many"], ["nonsense"]])
def test_misspelt_options_are_told_by_click(desk: Desk, arguments: list[str]) -> None:
    done = desk.run("--model", "gpt2", *arguments, code=2)
    assert "Traceback" not in done.stderr
    assert "Error: " in done.stderr


def test_without_arguments_it_explains_itself(desk: Desk) -> None:
    assert "Examples:" in desk.run().stdout
    done = desk.run("--sparsity", "2:4", code=2)
    assert "--model is missing" in one_sentence(done.stdout, done.stderr)


def test_help_names_every_method(desk: Desk) -> None:
    from llmprune.methods import METHODS

    text = desk.run("--help").stdout
    assert all(name in text for name in METHODS)


def test_ctrl_c_leaves_nothing_behind(desk: Desk) -> None:
    """Interrupted in the middle of the layers: one sentence, exit code 130, no file and no temporary directory."""
    command = [sys.executable, "-u", "-m", "llmprune", "--model", "gpt2", "--dataset", "text.txt", "--no-eval"]
    command += ["--num-samples", "400", "--seq-len", "8", "--output-dir", "interrupted"]
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits deafness
    with subprocess.Popen(command, cwd=desk.folder, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Relative output error" in line:
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "Interrupted" in rest
    assert "Traceback" not in rest
    assert not list(desk.folder.glob("*interrupted*"))
    assert not list(desk.folder.glob(".*interrupted*"))
