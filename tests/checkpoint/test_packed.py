"""Whole checkpoints packed and unpacked: the same bits, smaller, and never half or wrong without a word."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import llmprune
from llmprune.checkpoint import convert, stream
from llmprune.checkpoint.convert import pack_checkpoint, unpack_checkpoint
from llmprune.checkpoint.packed import pack_tensor
from llmprune.checkpoint.report import Report
from llmprune.checkpoint.stream import Source
from llmprune.checkpoint.verify import verify
from llmprune.cli import root
from llmprune.errors import UserError, VerificationError
from tests.builders import FAMILIES, tiny_model
from tests.checkpoint.packing import UP, config_of, pruned_checkpoint, same_bits, tensors_of

IDS = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_every_family_is_packed_proved_and_unpacked(family: str, max_shard_size: str, tmp_path: Path) -> None:
    source = pruned_checkpoint(tmp_path / "dense", family, max_shard_size=max_shard_size)
    done = pack_checkpoint(source, tmp_path / "packed")
    report, entries = Report.read(source), config_of(done.directory)["quantization_config"]["weights"]
    assert entries.keys() == {name for name, held in report.tensors.items() if held.weights}
    assert {entry["pattern"] for entry in entries.values()} == {"2:4"}
    assert done.patterns == {"2:4": len(entries)}
    held, plain = tensors_of(done.directory), tensors_of(source)
    for name, entry in entries.items():
        assert list(plain[name].shape) == entry["shape"]
        assert 2 * entry["kept"] == plain[name].numel()
        assert held[name].nbytes + held[f"{name}_index"].nbytes == 0.5625 * plain[name].nbytes
    assert same_bits(
        {n: t for n, t in held.items() if n.removesuffix("_index") not in entries},
        {n: t for n, t in plain.items() if n not in entries},
    )
    verify(done.directory, reload=False).raise_if_failed()
    back = unpack_checkpoint(done.directory, tmp_path / "back").directory
    assert same_bits(tensors_of(back), plain)
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in source.iterdir())
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    for path in source.glob("*.json"):
        assert json.loads((back / path.name).read_text()) == json.loads(path.read_text()), path.name
    verify(back, reload=max_shard_size == "5GB").raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    source = pruned_checkpoint(tmp_path / "dense", dtype=dtype)
    done = pack_checkpoint(source, tmp_path / "packed")
    assert tensors_of(done.directory)[UP].dtype == dtype
    unpack_checkpoint(done.directory, tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(source))


def test_negative_zeros_are_entries(tmp_path: Path) -> None:
    source = pruned_checkpoint(tmp_path / "dense", negative_zeros=True)
    done = pack_checkpoint(source, tmp_path / "packed")
    assert done.patterns.keys() == {"any"}
    unpack_checkpoint(done.directory, tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(source))


LOAD = """
import json, sys, warnings
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        print(json.dumps([directory, "loaded"]))
    except Exception as error:
        print(json.dumps([directory, type(error).__name__]))
assert "llmprune" not in sys.modules
"""


def test_plain_transformers_refuses_it_and_never_makes_up_weights(tmp_path: Path) -> None:
    """In a process that does not import llmprune; of each family once with N:M and once with zeros anywhere."""
    directories = []
    for family in FAMILIES:
        for negative_zeros in (False, True):  # with them, the pattern is "any"
            source = pruned_checkpoint(tmp_path / f"{family}-{negative_zeros}", family, negative_zeros=negative_zeros)
            directories.append(str(pack_checkpoint(source, source.with_suffix(".packed")).directory))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *directories], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    outcomes = dict(json.loads(line) for line in done.stdout.splitlines())
    assert list(outcomes) == directories
    assert "loaded" not in outcomes.values(), outcomes


def foreign_checkpoint(directory: Path, **tensors: Tensor) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "extra").mkdir()
    (directory / "extra" / "notes.txt").write_text("kept")
    return directory


def test_a_checkpoint_of_another_tool_is_packed_where_it_becomes_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    two, four, some, few = (torch.randn(7, 24) for _ in range(4))
    two[:, 1::4], two[:, 2::4] = 0, 0
    four.unflatten(1, (3, 8))[:, :, 4:] = 0
    some[torch.rand(7, 24) < 0.4] = 0
    few[0, 0] = 0
    held = {
        "two": two.to(torch.float16),
        "four": four,
        "some": some.to(torch.bfloat16),
        "few": few,
        "stack": two.clone().view(7, 3, 8),
        "odd": torch.tensor([[0, 0, 3, 0, 0], [0, 0, 0, 0, 0], [-0.0, torch.nan, 0, 0, 0]], dtype=torch.bfloat16),
        "line": torch.zeros(8),
        "whole": torch.zeros(8, 8, dtype=torch.int8),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.zeros(0, 8),
    }
    source = foreign_checkpoint(tmp_path / "dense", **held)
    done = pack_checkpoint(source, tmp_path / "packed")
    entries = config_of(done.directory)["quantization_config"]["weights"]
    patterns = {name: entry["pattern"] for name, entry in entries.items()}
    assert patterns == {"two": "2:4", "four": "4:8", "some": "any", "stack": "2:4", "odd": "any"}
    assert (done.directory / "extra" / "notes.txt").read_text() == "kept"
    unpack_checkpoint(done.directory, tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), held)


def test_conv1d_of_another_tool_is_packed_along_the_other_axis(tmp_path: Path) -> None:
    weight = torch.randn(24, 12)
    weight[1::4], weight[2::4] = 0, 0
    source = foreign_checkpoint(tmp_path / "dense", c_attn=weight)
    done = pack_checkpoint(source, tmp_path / "packed")
    assert config_of(done.directory)["quantization_config"]["weights"]["c_attn"]["pattern"] == "any"
    unpack_checkpoint(done.directory, tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), {"c_attn": weight})


def test_a_stack_of_experts_with_two_patterns_is_packed(tmp_path: Path) -> None:
    source = pruned_checkpoint(tmp_path / "dense", "gpt_oss")
    report = Report.read(source)
    name, held = next((name, held) for name, held in report.tensors.items() if len(held.weights) > 1)
    mixed = replace(held, weights=(replace(held.weights[0], pattern="1:4"), *held.weights[1:]))
    replace(report, tensors={**report.tensors, name: mixed}).write(source)
    done = pack_checkpoint(source, tmp_path / "packed")
    assert config_of(done.directory)["quantization_config"]["weights"][name]["pattern"] == "any"


def test_only_one_tensor_is_held_at_a_time(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was read or written for other tensors is gone when the next one is read."""
    alive: list[tuple[str, Any]] = []
    read, add = Source.get, stream._ShardWriter.add

    def watched_read(source: Source, name: str) -> Tensor:
        stem = name.removesuffix("_index")
        assert not [other for other, tensor in alive if tensor() is not None and other != stem]
        tensor = read(source, name)
        alive.append((stem, weakref.ref(tensor)))
        return tensor

    def watched_add(writer: Any, name: str, tensor: Tensor, *kind: Any) -> None:
        alive.append((name.removesuffix("_index"), weakref.ref(tensor)))
        add(writer, name, tensor, *kind)

    monkeypatch.setattr(Source, "get", watched_read)
    monkeypatch.setattr(stream._ShardWriter, "add", watched_add)
    done = pack_checkpoint(dense, tmp_path / "packed")
    unpack_checkpoint(done.directory, tmp_path / "back")
    assert len({name for name, _ in alive}) == done.tensors


def wrong_pack(tensor: Tensor, record: Any) -> Any:
    """Packs another tensor than it was given, as a fault of ours would."""
    done = pack_tensor(tensor, record)
    if done is not None:
        done[1].values.flatten()[0] += 1
    return done


def test_a_fault_in_packing_is_found_and_nothing_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "pack_tensor", wrong_pack)
    with pytest.raises(VerificationError, match="did not survive packing"):
        pack_checkpoint(dense, tmp_path / "packed")
    with pytest.raises(VerificationError, match="differs from what was saved"):
        llmprune.prune(
            tiny_model("llama"), dataset=IDS, method="magnitude", output_dir=tmp_path / "out", format="packed"
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_under_the_name_that_was_given(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream._ShardWriter, "add", full)
    with pytest.raises(UserError, match=f"written to {re.escape(str(tmp_path / 'packed'))}: the disk is full"):
        pack_checkpoint(dense, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_link_into_a_cache_is_followed(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in dense.iterdir():
        (source / path.name).symlink_to(path)
    done = pack_checkpoint(source, tmp_path / "packed")
    assert not any(path.is_symlink() for path in done.directory.iterdir())


def run(*arguments: object) -> None:
    root.main([str(argument) for argument in arguments], standalone_mode=False)


def test_the_verbs_pack_and_unpack_and_tell_the_gain(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("pack", dense, tmp_path / "packed")
    assert "14 of 21 tensors packed (14 2:4)" in capsys.readouterr().out
    run("unpack", tmp_path / "packed", tmp_path / "back")
    assert "14 of 21 tensors unpacked (14 2:4)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overwrite"):
        run("pack", dense, tmp_path / "packed")
    run("pack", dense, tmp_path / "packed", "--overwrite", "--quiet")
    assert capsys.readouterr() == ("", "")
    run("unpack", tmp_path / "packed", tmp_path / "back", "--overwrite", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["directory"] == str(tmp_path / "back")
    assert told["before"] < told["after"]
    assert (told["tensors"], told["patterns"]) == (21, {"2:4": 14})
    with pytest.raises(UserError, match="never changed"):
        run("unpack", tmp_path / "packed", tmp_path / "packed", "--overwrite")


def test_a_job_saves_packed_and_proves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmprune.display import show_result

    model = tiny_model("llama", torch.bfloat16)
    result = llmprune.prune(
        model, dataset=IDS, sparsity=0.5, method="magnitude", output_dir=tmp_path / "out", format="packed"
    )
    assert result.directory is not None
    assert sorted(path.name for path in result.directory.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "llmprune_report.json",
        "model.safetensors",
        "report.html",
    ]
    assert "import llmprune" in (result.directory / "README.md").read_text()
    size = (result.directory / "model.safetensors").stat().st_size
    assert result.dense_bytes is not None
    assert size < result.dense_bytes
    verify(result.directory).raise_if_failed()
    show_result(result)
    assert "import llmprune" in (shown := " ".join(capsys.readouterr().out.split()))
    assert f"{size / result.dense_bytes:.1%}" in shown
    back = unpack_checkpoint(result.directory, tmp_path / "back").directory
    assert 'from_pretrained("back")' in (card := (back / "README.md").read_text())  # a card of the dense files now
    assert "import llmprune" not in card
    verify(back).raise_if_failed()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in tensors_of(back)}
    assert same_bits(tensors_of(back), state)


def test_a_job_that_gains_nothing_by_packing_says_so(tmp_path: Path) -> None:
    result = llmprune.prune(
        tiny_model("llama"), dataset=IDS, sparsity=0.01, method="magnitude", output_dir=tmp_path / "o", format="packed"
    )
    assert result.dense_bytes is None
    assert any("saved dense" in note for note in Report.read(tmp_path / "o").notes)
    verify(tmp_path / "o").raise_if_failed()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"format": "zip"}, "dense, packed; got 'zip'"), ({"format": "packed"}, "give output_dir")],
)
def test_a_format_without_meaning_is_refused_early(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        llmprune.prune(tiny_model("llama"), dataset=IDS, **settings)
