"""What cannot be packed or unpacked is refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.checkpoint.convert import pack_checkpoint, unpack_checkpoint
from llmprune.checkpoint.verify import verify
from llmprune.errors import UserError
from tests.builders import tiny_model
from tests.checkpoint.packing import UP, config_of, spoil


def with_config(directory: Path, **settings: object) -> None:
    (directory / "config.json").write_text(json.dumps({**config_of(directory), **settings}))


def unfinished(directory: Path, **_: object) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {UP: "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def escaping(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "../model.safetensors"}}))


def taken(directory: Path) -> None:
    spoil(directory, lambda tensors: tensors.update({f"{UP}_index": torch.ones(2)}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
        (lambda d: (d / "model.safetensors").write_bytes(b"nothing"), "cannot be read"),
        (lambda d: with_config(d, quantization_config={"quant_method": "gptq"}), "quantized or compressed .*gptq"),
        (lambda d: with_config(d, text_config={"quantization_config": {"quant_method": "fp8"}}), "fp8"),
        (unfinished, "model-00002-of-00002.safetensors is missing"),
        (escaping, "names no files beside it"),
        (taken, f"{UP}_index, where the index"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    change: Callable[[Path], object], expected: str, dense: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    change(source)
    with pytest.raises(UserError, match=expected):
        pack_checkpoint(source, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_nothing_to_gain_is_an_error(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="no weight with enough zeros"):
        pack_checkpoint(tmp_path / "dense", tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_packed_is_not_packed_again_and_dense_not_unpacked(dense: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="packed already"):
        pack_checkpoint(packed, tmp_path / "again")
    with pytest.raises(UserError, match="dense already"):
        unpack_checkpoint(dense, tmp_path / "again")
    assert not list(tmp_path.iterdir())


def change_entry(directory: Path, **settings: object) -> None:
    config = config_of(directory)
    config["quantization_config"]["weights"][UP] |= settings
    (directory / "config.json").write_text(json.dumps(config))


def change_values(tensors: dict[str, Tensor]) -> None:
    tensors[UP] = tensors[UP][:, :-1].contiguous()


def change_index(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}_index"][3, 1] ^= 1


BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: spoil(d, change_values), f"{UP}: "),
    (lambda d: spoil(d, change_index), f"{UP}: the index"),
    (lambda d: spoil(d, lambda tensors: tensors.pop(f"{UP}_index")), f"{UP}_index"),
    (lambda d: change_entry(d, kept=3), f"{UP}: config.json"),
    (lambda d: change_entry(d, shape=[32, 48]), f"{UP}: "),
    (lambda d: change_entry(d, input_axis=2), f"{UP}: config.json"),
    (lambda d: change_entry(d, pattern="1:4"), f"{UP}: "),
]


@pytest.mark.parametrize(("change", "expected"), BAD)
def test_damaged_packed_data_is_refused_by_name_and_nothing_is_written(
    change: Callable[[Path], object], expected: str, copy: Path, tmp_path: Path
) -> None:
    change(copy)
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        unpack_checkpoint(copy, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    found = verify(copy, reload=False)
    assert any(UP in failure for check in found.checks for failure in check.failures)


@pytest.mark.parametrize(("settings", "expected"), [({"format": 2}, "update llmprune"), ({"weights": [1]}, "damaged")])
def test_a_format_that_is_not_known_is_refused(settings: dict[str, Any], expected: str, copy: Path) -> None:
    with_config(copy, quantization_config={**config_of(copy)["quantization_config"], **settings})
    with pytest.raises(UserError, match=expected):
        unpack_checkpoint(copy, copy.parent / "back")
    assert not verify(copy, reload=False).ok


def test_verify_finds_a_changed_value_in_a_packed_checkpoint(copy: Path) -> None:
    spoil(copy, lambda tensors: tensors[UP][2, 3:4].add_(1))
    found = verify(copy, reload=False)
    assert [failure for check in found.checks for failure in check.failures] == [f"{UP} differs from what was saved"]
