"""What lies beside the weights of a checkpoint that is rewritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmprune.checkpoint.stream import Source, copy_others

BESIDE = ("README.md", "tokenizer.json", "training_args.bin", "model_card.md", "modeling_x.py")
OTHER_FORMS = (
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "model.fp16.safetensors",
    "model.safetensors.index.json",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"weight": torch.ones(2, 2)}, source / "model.safetensors")
    for name in (*BESIDE, *OTHER_FORMS, ".gitattributes", ".cache/huggingface/x.json", "config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    for name in ("assets/picture.png", "original/params.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("kept")
    return source


def test_neighbours_come_along_but_no_second_copy_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    copy_others(Source(checkpoint), target, but=["config.json"])
    found = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    assert set(found) == {*BESIDE, "assets/picture.png", "original/params.json"}
    assert found["original/params.json"].read_text() == "kept"
    assert {path.name for path in target.iterdir() if path.is_dir()} == {"assets", "original"}
