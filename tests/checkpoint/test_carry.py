"""What save_pretrained leaves behind in the source comes along, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmprune.checkpoint.carry import Carried
from llmprune.checkpoint.convert import pack_checkpoint
from llmprune.checkpoint.save import write
from llmprune.model import load as load_model
from tests.builders import FAMILIES, tiny_model, tiny_tokenizer

MTP = {"model.layers.2.eh_proj.weight": torch.ones(4, 8), "model.layers.2.enorm.weight": torch.ones(4)}


def source_of(family: str, directory: Path, *, max_shard_size: str = "5GB") -> Path:
    tiny_model(family).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def add_tensors(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Into the single file of a source, as its authors would have."""
    held = load_file(source / "model.safetensors")
    save_file({**held, **tensors}, source / "model.safetensors", metadata={"format": "pt"})


def pruned_copy(source: Path, directory: Path, *, max_shard_size: str = "5GB") -> Carried:
    directory.mkdir()
    model = AutoModelForCausalLM.from_pretrained(source)
    return write(model, None, directory, source=source, max_shard_size=max_shard_size, provenance={})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_source_has_nothing_to_carry(family: str, tmp_path: Path) -> None:
    carried = pruned_copy(source_of(family, tmp_path / "source"), tmp_path / "out")
    assert carried == Carried()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_files_come_along_and_replace_nothing(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "source")
    texts = {
        "LICENSE.txt": "l",
        "NOTICE": "n",
        "USE_POLICY.md": "u",
        "modeling_x.py": "p",
        "processor_config.json": "{}",
        "generation_config.json": "{}",
        "README.md": "old card",
        "training_args.bin": "b",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    (out / "NOTICE").write_text("ours")
    carried = write(tiny_model("llama"), None, out, source=source, max_shard_size="5GB", provenance={})
    assert set(carried.files) == {"LICENSE.txt", "USE_POLICY.md", "modeling_x.py", "processor_config.json"}
    assert (out / "LICENSE.txt").read_text() == "l"
    assert (out / "NOTICE").read_text() == "ours"
    assert (out / "generation_config.json").read_text() != "{}"
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_tensors_that_the_class_does_not_load_come_along(tmp_path: Path, max_shard_size: str) -> None:
    source = source_of("llama", tmp_path / "source")
    add_tensors(source, MTP)
    out = tmp_path / "out"
    carried = pruned_copy(source, out, max_shard_size=max_shard_size)
    assert set(carried.tensors) == set(MTP)
    assert all(record.carried for record in carried.tensors.values())
    with safe_open(out / "model-extra.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("model.layers.2.eh_proj.weight"), torch.ones(4, 8))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert not (out / "model.safetensors").exists()
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    held = [load_file(path) for path in out.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in held for tensor in part.values())


def test_with_an_extra_shard_the_model_still_loads_whole(tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    add_tensors(source, MTP)
    pruned_copy(source, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) == set(MTP)
    expected = dict(tiny_model("mixtral").named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())


def test_a_sharded_source_is_read_by_its_index(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "source", max_shard_size="20KB")
    save_file(MTP, source / "mtp.safetensors")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(MTP, "mtp.safetensors")
    path.write_text(json.dumps(index))
    save_file({"stray": torch.ones(1)}, source / "consolidated.safetensors")
    assert set(pruned_copy(source, tmp_path / "out").tensors) == set(MTP)


def test_a_pruned_model_pruned_again_keeps_its_extras(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "source")
    add_tensors(source, MTP)
    pruned_copy(source, tmp_path / "once")
    assert set(pruned_copy(tmp_path / "once", tmp_path / "twice").tensors) == set(MTP)


@pytest.mark.parametrize("with_extra_packed", [False, True])
def test_a_packed_source_is_as_its_dense_one(tmp_path: Path, with_extra_packed: bool) -> None:
    """Without a report all that becomes smaller is packed, extras too."""
    weight = torch.where(torch.arange(32).view(4, 8) % 4 < 2, 3.0, 0.0 if with_extra_packed else 1.0)
    extras = {**MTP, "model.layers.2.eh_proj.weight": weight}
    source = source_of("llama", tmp_path / "source")
    held = load_file(source / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"][:, 8:] = 0.0
    save_file({**held, **extras}, source / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(source)
    packed = pack_checkpoint(source, tmp_path / "packed").directory
    entries = json.loads((packed / "config.json").read_text())["quantization_config"]["weights"]
    assert ("model.layers.2.eh_proj.weight" in entries) == with_extra_packed
    loaded = load_model(str(packed))
    (tmp_path / "out").mkdir()
    carried = write(loaded.model, None, tmp_path / "out", source=packed, max_shard_size="5GB", provenance={})
    assert carried.notes == ()
    assert set(carried.tensors) == set(extras)
    written = load_file(tmp_path / "out" / "model-extra.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extras.items())


def test_names_of_the_hubs_gpt2_are_known(tmp_path: Path) -> None:
    """Its file was saved from the inner model, a tied head beside it, and holds causal masks as buffers."""
    source = source_of("gpt2", tmp_path / "source")
    held = load_file(source / "model.safetensors")
    inner = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(64, 64).tril().view(1, 1, 64, 64) for layer in range(2)}
    head = {"lm_head.weight": held["transformer.wte.weight"].clone()}
    save_file({**inner, **masks, **head}, source / "model.safetensors", metadata={"format": "pt"})
    assert pruned_copy(source, tmp_path / "out").tensors == {}


def test_a_quantized_source_keeps_its_tensors_and_a_note_says_so(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "source")
    add_tensors(source, MTP)
    model = AutoModelForCausalLM.from_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "out").mkdir()
    carried = write(model, None, tmp_path / "out", source=source, max_shard_size="5GB", provenance={})
    assert carried.tensors == {}
    assert "quantized" in carried.notes[0]
