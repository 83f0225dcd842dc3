"""The bitmask checkpoints of compressed-tensors ≤ 0.14 become dense again, and what is more than sparse is refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.checkpoint.convert import pack_checkpoint, unpack_checkpoint
from llmprune.errors import UserError

DENSE, TWO_FOUR = "sparse-bitmask", "sparse-24-bitmask"


def bitmask_of(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def written(stem: str, weight: Tensor, form: str) -> dict[str, Tensor]:
    """The tensors of one weight, as that library lays them out."""
    if form == TWO_FOUR:
        order = weight.abs().unflatten(1, (-1, 4)).argsort(-1, descending=True).argsort(-1)
        mask = (order < 2).flatten(1)
        values, shape = weight[mask].reshape(len(weight), -1), torch.tensor(weight.shape).reshape(-1, 1)
        return {f"{stem}.compressed": values, f"{stem}.bitmask": bitmask_of(mask), f"{stem}.shape": shape}
    mask = weight != 0
    counts = mask.sum(-1)
    return {
        f"{stem}.compressed": weight[mask],
        f"{stem}.bitmask": bitmask_of(mask),
        f"{stem}.shape": torch.tensor(weight.shape),
        f"{stem}.row_offsets": counts.cumsum(0) - counts if counts.ndim else counts,
    }


def block(form: str, **settings: Any) -> dict[str, Any]:
    sparsity = {"format": form, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity, **settings}


def weights(columns: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    held = {"model.a.q_proj.weight": torch.randn(5, columns), "model.a.up_proj.weight": torch.randn(3, columns)}
    for weight in held.values():
        weight[:, 0::4], weight[:, 3::4] = 0, 0
        weight[1] = 0  # dead groups
    return {name: weight.to(torch.bfloat16) for name, weight in held.items()}


def checkpoint(directory: Path, form: str, held: dict[str, Tensor], *, config: dict[str, Any] | None = None) -> Path:
    """Two shards, and one weight's parts spread over both."""
    directory.mkdir()
    tensors = {"model.norm.bias": torch.ones(4)}
    for name, weight in held.items():
        tensors |= written(name.removesuffix(".weight"), weight, form)
    shards = {name: f"model-0000{1 + (i % 3 == 0)}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if shards[name] == shard}
        save_file(part, directory / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    plain = {"model_type": "llama", "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps({**plain, **(config or {"quantization_config": block(form)})}))
    return directory


def tensors_of(directory: Path) -> dict[str, Tensor]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    held: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        part = load_file(shard)
        assert all(index["weight_map"][name] == shard.name for name in part)
        held |= part
    assert held.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    return held


@pytest.mark.parametrize(("form", "columns"), [(TWO_FOUR, 16), (TWO_FOUR, 12), (DENSE, 16), (DENSE, 13), (DENSE, 4)])
def test_a_bitmask_checkpoint_becomes_dense(form: str, columns: int, tmp_path: Path) -> None:
    held = weights(columns)
    if form == DENSE:
        held["model.norm.weight"] = torch.tensor([1.0, 0, 2, 0, 0])  # older releases compressed every weight
    source = checkpoint(tmp_path / "old", form, held)
    done = unpack_checkpoint(source, tmp_path / "dense")
    assert done.patterns == {form: len(held)}
    found = tensors_of(done.directory)
    assert found.keys() == {*held, "model.norm.bias"}
    for name, weight in held.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name
    assert json.loads((done.directory / "config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
    }


@pytest.mark.parametrize("key", ["compression_config", "sparsity_config"])
def test_older_ways_to_say_it_in_the_configuration_are_read(key: str, tmp_path: Path) -> None:
    said = block(DENSE)
    config = {key: said["sparsity_config"] if key == "sparsity_config" else said}
    source = checkpoint(tmp_path / "old", DENSE, weights(16), config=config)
    with pytest.raises(UserError, match="quantized or compressed"):
        pack_checkpoint(source, tmp_path / "packed")
    unpack_checkpoint(source, tmp_path / "dense")
    assert key not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_rescued_checkpoint_can_be_packed(tmp_path: Path) -> None:
    held = weights(16)
    dense = unpack_checkpoint(checkpoint(tmp_path / "old", TWO_FOUR, held), tmp_path / "dense").directory
    assert pack_checkpoint(dense, tmp_path / "packed").patterns == {"2:4": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            block(DENSE, config_groups={"group_0": {}}, format="float-quantized"),
            "quantized .float-quantized. as well as",
        ),
        (block("marlin-24"), "is compressed-tensors .marlin-24."),
        ({"quant_method": "gptq"}, "is gptq; unpack reads"),
    ],
)
def test_what_is_not_only_sparse_is_refused(config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "old", DENSE, weights(16), config={"quantization_config": config})
    with pytest.raises(UserError, match=expected):
        unpack_checkpoint(source, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def spoil(directory: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            new = change(tensors.pop(name))
            save_file({**tensors, **({} if new is None else {name: new})}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("bitmask", lambda tensor: None, "and no model.a.q_proj.bitmask"),
        ("shape", lambda tensor: None, "and no model.a.q_proj.shape"),
        ("shape", lambda tensor: tensor + 8, "model.a.q_proj.bitmask has 10 bytes"),
        ("bitmask", lambda tensor: tensor ^ 1, "model.a.q_proj.weight: the index"),
        ("compressed", lambda tensor: tensor[:-1], "model.a.q_proj.weight: the index"),
        ("compressed", lambda tensor: tensor.to(torch.float8_e4m3fn), "is F8_E4M3: the checkpoint is quantized"),
    ],
)
def test_damage_is_told_by_name_and_nothing_is_written(
    part: str, change: Callable[[Tensor], Tensor | None], expected: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "old", DENSE, weights(16))
    spoil(source, f"model.a.q_proj.{part}", change)
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        unpack_checkpoint(source, tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


PEER = """
import json, sys
from pathlib import Path
import torch
from compressed_tensors import BaseCompressor, __version__
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import save_file

assert __version__.startswith("0.14"), __version__
folder = Path(sys.argv[1])
torch.manual_seed(0)
for form in ("sparse-bitmask", "sparse-24-bitmask"):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        held = {}
        for name, shape in {"a.q_proj": (24, 40), "a.down_proj": (7, 36), "b.up_proj": (16, 64)}.items():
            weight = torch.randn(shape)
            if form == "sparse-24-bitmask":
                order = weight.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1)
                weight[(order < 2).flatten(1)] = 0
            else:
                weight[torch.rand(shape) < 0.6] = 0
            weight[2] = 0
            held[f"model.{name}.weight"] = weight.to(dtype)
        dense = {**held, "model.a.q_proj.bias": torch.randn(24), "lm_head.weight": torch.randn(5, 8)}
        out = folder / f"{form}-{str(dtype).removeprefix('torch.')}"
        out.mkdir()
        sparsity = SparsityCompressionConfig.load_from_registry(
            form, format=form, sparsity_structure="2:4" if "24" in form else "unstructured", targets=["Linear"]
        )
        compressor = BaseCompressor.load_from_registry(form, config=sparsity)
        targets = {name.removesuffix(".weight") for name in held}
        compressed = compressor.compress(dense, compression_targets=targets)
        save_file({k: v.contiguous() for k, v in compressed.items()}, out / "model.safetensors", {"format": "pt"})
        save_file(dense, folder / f"{out.name}.dense")
        said = {"quant_method": "compressed-tensors", "sparsity_config": json.loads(sparsity.model_dump_json())}
        (out / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": said}))
"""


def test_files_that_compressed_tensors_wrote_itself(tmp_path: Path) -> None:
    """Written by compressed-tensors 0.14, the last that could, in an interpreter that has it."""
    python = os.environ.get("LLMPRUNE_PEER_PYTHON")
    if not python:
        pytest.skip("needs an interpreter with compressed-tensors 0.14; name it in LLMPRUNE_PEER_PYTHON")
    done = subprocess.run([python, "-c", PEER, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    directories = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(directories) == 6
    for source in directories:
        target = source.with_suffix(".out")
        assert sum(unpack_checkpoint(source, target).patterns.values()) == 3
        found, expected = load_file(target / "model.safetensors"), load_file(source.with_suffix(".dense"))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), (source.name, name)
