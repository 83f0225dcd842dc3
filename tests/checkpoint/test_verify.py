"""Verification passes what was saved, and fails on every way in which it can be wrong, naming the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.checkpoint.layout import digest, fingerprint, saved_ties
from llmprune.checkpoint.probe import take_probe
from llmprune.checkpoint.report import REPORT, Report, describe_tensors, totals
from llmprune.checkpoint.save import write
from llmprune.checkpoint.verify import Verification, verify
from llmprune.errors import NumericError, UserError, VerificationError
from tests.builders import FAMILIES, tiny_model
from tests.checkpoint.pruning import prune_by_hand

MTP = {"model.layers.2.eh_proj.weight": torch.ones(4, 8)}
UP = "model.layers.1.mlp.up_proj.weight"


def pruned_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    pattern: str = "2:4",
    scope: str = "group",
    source: Path | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    model = tiny_model(family, torch.bfloat16)
    before = fingerprint(model)
    pruned = prune_by_hand(model, pattern, scope)
    directory.mkdir(parents=True)
    carried = write(model, None, directory, source=source, max_shard_size=max_shard_size, provenance={"a": 1})
    tensors = describe_tensors(model, pruned, before=before)
    report = Report(
        versions={},
        command="",
        config={},
        source={},
        pruned=tuple(pruned),
        skipped=(),
        totals=totals(pruned, tensors),
        tensors={**tensors, **carried.tensors},
        ties=saved_ties(model),
    )
    report.write(directory)
    return directory


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_checkpoint(tmp_path_factory.mktemp("good") / "out")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(good, tmp_path / "out"))


def failures(found: Verification) -> str:
    return "\n".join(failure for check in found.checks for failure in check.failures)


def spoil(directory: Path, name: str, change: Callable[[Tensor], object], *, cover: bool = False) -> None:
    """Change a tensor in the single file; with `cover`, the report's digest and count with it."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    if cover:
        report = Report.read(directory)
        zeros = int((tensors[name] == 0).sum())
        entry = replace(report.tensors[name], sha256=digest(tensors[name]), zeros=zeros)
        replace(report, tensors={**report.tensors, name: entry}).write(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_what_was_saved_is_verified(family: str, max_shard_size: str, tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", family, max_shard_size=max_shard_size)
    model = tiny_model(family, torch.bfloat16)
    prune_by_hand(model)
    found = verify(directory, probe=take_probe(model))
    found.raise_if_failed()
    counts = {check.what: check.count for check in found.checks}
    assert counts["every tensor once, and no other"] == counts["bytes as reported"] == len(fingerprint(model))
    assert counts["zeros of every pruned weight"] == len(Report.read(directory).pruned)
    assert counts["same logits as before saving"] == 16 * 64
    assert counts["ties"] == (family == "gpt2")


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_unstructured_patterns_are_verified(family: str, scope: str, tmp_path: Path) -> None:
    verify(pruned_checkpoint(tmp_path / "out", family, pattern="50%", scope=scope), reload=False).raise_if_failed()


def test_zeros_that_fall_by_chance_are_welcome(tmp_path: Path) -> None:
    """A group may hold more zeros than m − n, if a kept weight is zero by itself."""
    directory = pruned_checkpoint(tmp_path / "out", pattern="3:4")
    verify(directory, reload=False).raise_if_failed()


def test_a_carried_shard_belongs_to_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    held = load_file(source / "model.safetensors")
    save_file({**held, **MTP}, source / "model.safetensors", metadata={"format": "pt"})
    directory = pruned_checkpoint(tmp_path / "out", source=source)
    verify(directory).raise_if_failed()
    save_file({name: tensor + 1 for name, tensor in MTP.items()}, directory / "model-extra.safetensors")
    assert "eh_proj.weight differs from what was in the source" in failures(verify(directory, reload=False))


@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_one_flipped_byte_is_found_and_named(copy: Path, name: str) -> None:
    path = copy / "model.safetensors"
    raw = bytearray(path.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + header])[name]["data_offsets"]
    raw[8 + header + begin + 5] ^= 1
    path.write_bytes(raw)
    found = verify(copy, reload=False)
    assert not found.ok
    with pytest.raises(VerificationError, match=name.replace(".", r"\.")):
        found.raise_if_failed()


def test_one_weight_too_many_in_a_group_is_found(copy: Path) -> None:
    spoil(copy, UP, lambda tensor: tensor[7, 8:9].fill_(1), cover=True)
    found = verify(copy, reload=False)
    assert f"{UP} breaks 2:4 in 1 of 384 groups" in failures(found)
    assert f"{UP} holds 767 zeros, not 768" in failures(found)
    assert "differs" not in failures(found)


def test_a_row_with_too_few_zeros_is_found(tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", pattern="50%", scope="row")

    def move_two_zeros(tensor: Tensor) -> None:
        tensor[3, 0], tensor[3, 1] = 1, 1
        tensor[4, 2], tensor[4, 3] = 0, 0

    spoil(directory, UP, move_two_zeros, cover=True)
    assert failures(verify(directory, reload=False)) == f"{UP} has fewer than 16 zeros in 1 of 48 rows"


def test_a_matrix_that_is_too_dense_is_found(tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", pattern="50%", scope="matrix")
    report = Report.read(directory)
    rows = tuple(replace(row, pattern="51%") for row in report.pruned)
    replace(report, pruned=rows).write(directory)
    assert f"{UP} holds 768 zeros, and 51% needs 783" in failures(verify(directory, reload=False))


def test_a_stale_shard_is_found(copy: Path) -> None:
    save_file({UP: torch.ones(2), "old.weight": torch.ones(2)}, copy / "model-00001-of-00002.safetensors")
    said = failures(verify(copy, reload=False))
    assert f"{UP} is in model-00001-of-00002.safetensors and model.safetensors" in said
    assert "old.weight is not in the report" in said


def test_a_stale_single_file_beside_shards_is_found(good: Path, tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", max_shard_size="20KB")
    shutil.copy(good / "model.safetensors", directory)
    assert "would be loaded in its place" in failures(verify(directory, reload=False))


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", max_shard_size="20KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    (directory / index["weight_map"][UP]).unlink()
    found = verify(directory)
    assert f"{UP} is missing" in failures(found)
    assert f"{UP} is not where it points" in failures(found)
    assert not found.checks[-1].ok  # and transformers does not load it


def test_a_truncated_file_is_found(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors (" in failures(verify(copy))


def test_a_tie_broken_in_the_file_is_found(tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", "gpt2")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": torch.ones(64, 32)}, path, metadata={"format": "pt"})
    assert "lm_head.weight is stored though it is tied to transformer.wte.weight" in failures(
        verify(directory, reload=False)
    )


def test_a_tie_broken_in_the_configuration_is_found(tmp_path: Path) -> None:
    directory = pruned_checkpoint(tmp_path / "out", "gpt2")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    said = failures(verify(directory))
    assert "lm_head.weight is missing" in said
    assert "lm_head.weight is no longer tied to transformer.wte.weight" in said


def test_a_leftover_quantization_is_found(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    assert "names a quantization" in failures(verify(copy, reload=False))


def test_other_logits_are_found(good: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    prune_by_hand(model)
    probe = take_probe(model)
    assert verify(good, probe=probe).ok
    probe.logits[0, 3, 5] += 1e-3
    assert "they differ by up to" in failures(verify(good, probe=probe))


def test_a_probe_is_the_same_every_time_and_changes_nothing() -> None:
    model = tiny_model("llama").train()
    one, other = take_probe(model), take_probe(model)
    assert model.training
    assert one.input_ids.shape == (1, 16)
    assert torch.equal(one.logits, other.logits)


def test_a_model_that_answers_nan_is_refused() -> None:
    model = tiny_model("llama")
    model.get_parameter(UP).data.fill_(float("nan"))
    with pytest.raises(NumericError, match="NaN"):
        take_probe(model)


def test_without_a_report_there_is_nothing_to_verify(copy: Path) -> None:
    (copy / REPORT).unlink()
    with pytest.raises(UserError, match="give a checkpoint that llmprune saved"):
        verify(copy)


def test_an_error_names_the_first_few_only(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(VerificationError, match=r"is missing; and 16 more"):
        verify(copy, reload=False).raise_if_failed()
