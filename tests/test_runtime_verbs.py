"""`llmprune generate`, `bench` and `tune` on a tiny packed model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from llmprune.cli import main, root
from llmprune.errors import UserError
from llmprune.runtime import peak, timing, tune
from llmprune.runtime.bench import bench
from llmprune.runtime.opening import Wanted, open_model
from tests.builders import tiny_tokenizer
from tests.packed_models import Pair, packed_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A packed model with a tokenizer, and the same dense."""
    made = packed_pair("llama", tmp_path_factory.mktemp("verbs"))
    for directory in (made.dense, made.packed):
        tiny_tokenizer().save_pretrained(directory)
    return made


def run(*arguments: Any) -> Result:
    done = CliRunner().invoke(root, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_generate_gives_the_same_text_packed_and_dense(pair: Pair) -> None:
    texts = [
        run("generate", path, "--prompt", "once upon", "--max-new-tokens", 12, "--device", "cpu")
        for path in (pair.packed, pair.dense)
    ]
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stdout.startswith("o n c e   u p o n")  # this tokenizer sets its tokens apart
    assert "tokens/s; 14 packed linears" in texts[0].stderr
    assert "tokens/s; a dense model" in texts[1].stderr


def test_generate_shows_one_text_whatever_the_model_prefers(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.packed, tmp_path / "beams")
    (tmp_path / "beams" / "generation_config.json").write_text('{"num_beams": 3, "num_return_sequences": 2}')
    arguments = ("--prompt", "once upon", "--max-new-tokens", 12, "--device", "cpu")
    one, other = (run("generate", path, *arguments).stdout for path in (pair.packed, tmp_path / "beams"))
    assert one == other


def test_generate_draws_the_same_with_the_same_seed(pair: Pair) -> None:
    settings = ("--prompt", "a b c", "--max-new-tokens", 16, "--temperature", 2.0, "--device", "cpu")
    one, same, other = (run("generate", pair.packed, *settings, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "{packed}", "--prompt", ""], "--prompt is empty"),
        (["generate", "{packed}", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "{packed}", "--prompt", "abcd", "--max-new-tokens", "61"], "takes 64 tokens; got a prompt of 4"),
        (["generate", "{packed}", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "{packed}", "--prompt", "a", "--dtype", "int4"], "--dtype is one of"),
        (["generate", "{packed}", "--prompt", "a", "--device", "meta"], "got meta, which holds shapes only"),
        (["generate", "{nowhere}", "--prompt", "a"], "cannot be loaded"),
        (["generate", "{mute}", "--prompt", "a"], "needs a tokenizer"),
    ],
)
def test_what_cannot_be_run_ends_in_one_sentence(
    arguments: list[str],
    told: str,
    pair: Pair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mute = tmp_path / "mute"
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        (mute / name).write_bytes((pair.packed / name).read_bytes())
    places = {"packed": pair.packed, "nowhere": tmp_path / "nowhere", "mute": mute}
    monkeypatch.setattr(sys, "argv", ["llmprune", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert told in error


def test_bench_puts_both_side_by_side(pair: Pair) -> None:
    settings = ("--max-new-tokens", 6, "--rounds", 2, "--no-memory", "--device", "cpu")
    found = json.loads(run("bench", pair.packed, *settings, "--prompt", "abc", "--json").stdout)
    assert found["prompt_tokens"] == 3
    assert found["dense"]["tokens"] == found["sparse"]["tokens"]
    assert len(found["sparse"]["tokens"]) == 6
    assert found["differs_at"] is None
    assert found["ratios"]["bytes_per_token"] > 1.2
    assert found["sparse"]["weights"] < found["dense"]["weights"]
    assert min(found[form][speed] for form in ("dense", "sparse") for speed in ("prefill", "decode")) > 0
    table = run("bench", pair.dense, *settings).stdout  # packed in memory, a prompt drawn at random
    assert "The same 6 tokens from both." in table
    assert "14 packed linears" in table


def test_experts_that_run_dense_are_told_of(tmp_path: Path) -> None:
    made = packed_pair("mixtral", tmp_path)
    packed, dense = made.packed, load_file(made.dense / "model.safetensors")
    tiny_tokenizer().save_pretrained(packed)
    done = run("generate", packed, "--prompt", "ab", "--max-new-tokens", 2, "--device", "cpu")
    assert "8 packed linears (24 packed weights became dense while loading)." in done.stderr
    config = json.loads((packed / "config.json").read_text())
    weights = config["quantization_config"]["weights"]
    tensors = load_file(packed / "model.safetensors")
    for key in [key for key in weights if "experts" not in key]:  # as of a model of which only experts were pruned
        tensors[key] = torch.ones_like(dense[key])
        del tensors[f"{key}_index"], weights[key]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its 24 packed weights are parts of fused parameters"):
        bench(Wanted(str(packed), device="cpu"), None, new_tokens=2, rounds=1)


def test_bench_says_when_memory_cannot_be_taken(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.runtime import bench as module

    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"status 1 .*--no-memory"):
        bench(Wanted(str(pair.packed), device="cpu"), "abc", new_tokens=2, rounds=1)


def test_bench_says_where_texts_part(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.runtime import bench as module

    def spoilt(model: Any) -> None:
        densify(model)
        model.lm_head.weight.data.neg_()

    densify = module.densify
    monkeypatch.setattr(module, "densify", spoilt)
    found = bench(Wanted(str(pair.packed), device="cpu"), "abc", new_tokens=4, rounds=1, memory=False)
    assert found.differs_at == 0
    assert "The same 0 tokens from both, then another" in "\n".join(module._lines(found))


def test_a_token_reads_one_row_of_an_embedding_and_the_chosen_experts(tmp_path: Path) -> None:
    from llmprune.runtime.bench import bytes_per_token

    model = open_model(Wanted(str(packed_pair("mixtral", tmp_path).dense), device="cpu")).model
    experts = sum(parameter.nbytes for name, parameter in model.named_parameters() if "experts" in name)
    embedding = model.get_input_embeddings().weight
    total = sum(parameter.nbytes for parameter in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert bytes_per_token(model) == total - embedding.nbytes + embedding[:1].nbytes - experts // 2


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_peak_memory_is_told_of_either_form(form: str, pair: Pair) -> None:
    task = {"wanted": {"name": str(pair.packed), "device": "cpu"}, "form": form, "new_tokens": 2}
    assert peak.peak(**task)["cpu"] > 10**7  # type: ignore[arg-type]


def test_tune_tells_what_it_chose_and_where_it_is_kept(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "timings_file", lambda device: tmp_path / "timings.json")
    timing.forget()
    done = run("tune", pair.packed, "--seconds", 0, "--device", "cpu")
    timing.forget()
    assert "2:4 float32 48x32 50%" in done.stdout
    assert "1024 tokens" in done.stdout
    assert str(tmp_path / "timings.json") in done.stderr
    assert (tmp_path / "timings.json").exists()


def test_tune_tells_a_program_or_nobody(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "timings_file", lambda device: tmp_path / "timings.json")
    monkeypatch.setattr(tune, "TOKENS", {"cpu": (1,)})
    timing.forget()
    as_json = run("tune", pair.packed, "--seconds", 0, "--device", "cpu", "--json")
    silent = run("tune", pair.packed, "--seconds", 0, "--device", "cpu", "--quiet")
    timing.forget()
    told = json.loads(as_json.stdout)
    kept = json.loads((tmp_path / "timings.json").read_text())["microseconds"]
    assert told["file"] == str(tmp_path / "timings.json")
    assert {weight["kind"] for weight in told["weights"]} == set(kept)
    assert all(weight["chosen"]["1"] in weight["microseconds"]["1"] for weight in told["weights"])
    assert as_json.stderr + silent.output == ""


def test_verbs_are_listed_without_loading_torch() -> None:
    helped = run("--help").stdout
    assert all(verb in helped for verb in ("generate", "bench", "tune"))
    assert torch  # it is loaded here; tests/test_imports.py looks at a fresh interpreter
