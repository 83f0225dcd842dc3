"""A model on disk: loads as it was, names no quantization, and fails early rather than late."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmprune.checkpoint.save import check_generation_config, write
from llmprune.checkpoint.target import publish
from llmprune.errors import UserError
from tests.builders import FAMILIES, tiny_model, tiny_tokenizer


def save(model: PreTrainedModel, directory: Path, *, max_shard_size: str = "5GB") -> None:
    directory.mkdir(exist_ok=True)
    write(model, None, directory, source=None, max_shard_size=max_shard_size, provenance={"method": "none"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_saved_model_loads_as_it_was(family: str, max_shard_size: str, tmp_path: Path) -> None:
    model = tiny_model(family, torch.bfloat16)
    save(model, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.llmprune_config == {"method": "none"}
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())


def test_the_tokenizer_comes_with_its_chat_template(tmp_path: Path) -> None:
    write(
        tiny_model("llama"),
        tiny_tokenizer(chat_template="{{ messages }}"),
        tmp_path,
        source=None,
        max_shard_size="5GB",
        provenance={},
    )
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages }}"


def test_no_local_path_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "ada"
    monkeypatch.setattr(Path, "home", lambda: home)
    tiny_model("llama").save_pretrained(home / "source")
    tiny_tokenizer().save_pretrained(home / "source")
    model = AutoModelForCausalLM.from_pretrained(home / "source")
    tokenizer = AutoTokenizer.from_pretrained(home / "source")
    out = tmp_path / "out"
    out.mkdir()
    provenance = {"model": str(home / "source")}
    write(model, tokenizer, out, source=home / "source", max_shard_size="5GB", provenance=provenance)
    assert model.config.llmprune_config == {"model": "~/source"}
    assert [path.name for path in out.glob("*.json") if str(tmp_path) in path.read_text()] == []


@pytest.mark.parametrize("place", ["config", "quantizer"])
def test_a_quantized_model_is_refused(tmp_path: Path, place: str) -> None:
    model = tiny_model("llama")
    if place == "config":
        model.config.quantization_config = {"quant_method": "gguf"}
    else:
        model.hf_quantizer = object()
    with pytest.raises(UserError, match="quantization_config"):
        save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def full(directory: Path, **_: object) -> None:
        (directory / "config.json").write_text("{}")
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(UserError, match="disk is full"), publish(tmp_path / "out", overwrite=False) as staging:
        save(model, staging)
    assert list(tmp_path.iterdir()) == []


def test_a_sound_generation_config_is_left_alone() -> None:
    model = tiny_model("llama")
    before = model.generation_config.to_dict()
    assert check_generation_config(model) == []
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize(
    ("settings", "after", "note"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6}, "do_sample=True was added"),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False, "temperature": None}, "temperature=0.6"),
        ({"length_penalty": 0.5}, {"length_penalty": None}, "length_penalty=0.5 was dropped"),
        ({"output_scores": True}, {"output_scores": None}, "output_scores=True"),
        ({"pad_token_id": -1}, {"pad_token_id": None}, "pad_token_id=-1"),
    ],
    ids=["sampling meant", "sampling off", "beams", "outputs", "pad"],
)
def test_harmless_contradictions_are_settled(
    settings: dict[str, object], after: dict[str, object], note: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "refused")
    notes = check_generation_config(model)
    assert any(note in sentence for sentence in notes)
    assert {name: getattr(model.generation_config, name) for name in after} == after
    save(model, tmp_path / "saved")


def test_settings_that_transformers_saves_are_kept(tmp_path: Path) -> None:
    """Loaded and unchanged, an odd configuration may pass; whatever happens, saving must not fail later."""
    tiny_model("llama").save_pretrained(tmp_path / "odd")
    path = tmp_path / "odd" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.6}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    check_generation_config(model)
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["temperature"] == 0.6


def test_what_cannot_be_settled_is_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    model.generation_config.num_return_sequences = 3
    with pytest.raises(UserError, match=r"num_return_sequences.*Correct"):
        check_generation_config(model)
