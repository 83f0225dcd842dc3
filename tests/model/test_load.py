"""Loading: quantized checkpoints come out as plain weights or are refused, and every failure is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.errors import UnsupportedModel, UserError
from llmprune.model import load
from tests.builders import tiny_model, tiny_tokenizer

IDS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))


def checkpoint(family: str, directory: Path) -> dict[str, Tensor]:
    """A saved tiny model with its tokenizer; returns its tensors."""
    tiny_model(family).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def requantize(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], **changes: Any) -> None:
    """Put other tensors and a quantization into a saved checkpoint."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes, "quantization_config": quantization}
    path.write_text(json.dumps(config))


def fp8_checkpoint(directory: Path) -> dict[str, Tensor]:
    """Linears as float8 with one scale each, as DeepSeek-V3's files hold them. Returns their values."""
    dense, stored, values = checkpoint("llama", directory), {}, {}
    for name, tensor in dense.items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
        values[name] = stored[name].float() * scale
    requantize(directory, stored, {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"})
    return values


def mxfp4_checkpoint(directory: Path) -> None:
    """Experts as 4-bit blocks with a shared exponent, as gpt-oss's files hold them."""
    stored, experts, hidden, intermediate = {}, 4, 32, 64
    generator = torch.Generator().manual_seed(0)
    for name, tensor in checkpoint("gpt_oss", directory).items():
        if name.endswith("gate_up_proj_bias"):
            stored[name] = torch.zeros(experts, 2 * intermediate)
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            rows, columns = (2 * intermediate, hidden) if "gate_up" in name else (hidden, intermediate)
            shape = (experts, rows, columns // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
        else:
            stored[name] = tensor
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": dense}
    requantize(directory, stored, quantization, intermediate_size=intermediate)


def test_fp8_comes_out_as_plain_weights_and_is_pruned(tmp_path: Path) -> None:
    values = fp8_checkpoint(tmp_path / "fp8")
    model = load(str(tmp_path / "fp8")).model
    for name, value in values.items():
        torch.testing.assert_close(model.get_parameter(name).data, value)
    assert_pruned(tmp_path / "fp8", tmp_path / "out")


def test_mxfp4_comes_out_as_plain_experts_and_is_pruned(tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path / "mxfp4")
    experts = load(str(tmp_path / "mxfp4")).model.model.layers[0].mlp.experts.gate_up_proj
    assert experts.is_floating_point()
    assert len(experts.unique()) == 15  # e2m1 has 15 values, and all scales are equal
    assert_pruned(tmp_path / "mxfp4", tmp_path / "out")


def assert_pruned(source: Path, output: Path) -> None:
    report = llmprune.prune(str(source), dataset=IDS, output_dir=output).report
    assert report.totals["pruned_zeros"] >= report.totals["pruned_parameters"] // 2
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").num_parameters() > 0


def test_a_quantization_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    requantize(tmp_path, checkpoint("llama", tmp_path), {"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"'gptq'.*gguf, mxfp4, fp8"):
        load(str(tmp_path))


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    checkpoint("gpt2", tmp_path)
    assert load(str(tmp_path)).model.dtype == torch.float32
    assert load(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "does not exist"),
        ("./nowhere.gguf", "GGUF file nowhere.gguf does not exist"),
        ("nobody/nothing", "nobody/nothing cannot be loaded"),
        ("a b", "a b cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_had_costs_one_sentence(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_costs_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json; give one made by save_pretrained"):
        load(str(tmp_path))


def test_a_damaged_checkpoint_costs_one_sentence(tmp_path: Path) -> None:
    checkpoint("gpt2", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path))


def test_a_file_that_is_no_gguf_costs_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF? no")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(tmp_path / "m.gguf"))
