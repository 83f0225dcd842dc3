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
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"weight": torch.ones(2, 2)}, source / "model.safetensors")
    for name in (*BESIDE, *OTHER_FORMS, ".gitattributes", "config.json"):
        (source / name).write_text("{}")
    (source / "assets").mkdir()
    (source / "assets" / "picture.png").write_text("kept")
    return source


def test_neighbours_come_along_but_no_second_copy_of_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    copy_others(Source(checkpoint), target, but=["config.json"])
    assert {path.name for path in target.iterdir()} == {*BESIDE, "assets"}
    assert (target / "assets" / "picture.png").read_text() == "kept"
