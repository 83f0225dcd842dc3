"""A hollow model computes what the loaded one does, with one unit of it in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmprune.model import Shelf, find_decoder, shelf, shelf_of
from llmprune.model.load import from_files
from llmprune.model.read_ahead import read_ahead, spans
from tests.builders import tiny_model

IDS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def both(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Shelf]:
    """A model in memory, the same one hollow, and its shelf."""
    tiny_model(family, dtype).save_pretrained(folder / "model")
    whole, _ = from_files(folder / "model", rest_on_disk=None, dtype="auto")
    hollow, _ = from_files(folder / "model", rest_on_disk=folder / "converted", dtype="auto")
    shelf = shelf_of(hollow)
    assert shelf is not None
    return whole, hollow, shelf


def in_memory(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.device.type != "meta"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "gpt_oss"])
def test_a_hollow_model_computes_what_the_loaded_one_does(family: str, tmp_path: Path) -> None:
    whole, hollow, shelf = both(family, tmp_path, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(whole(IDS).logits, hollow(IDS).logits)
    assert not in_memory(hollow)
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, shelf.read(name)), name
        assert shelf.read(name).stride() == parameter.stride(), name  # the walk tells transposes by them


def test_only_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    _, hollow, _ = both("llama", tmp_path)
    seen: list[set[str]] = []
    for layer in hollow.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append({name.split(".")[2] for name in in_memory(hollow)}))
    with torch.no_grad():
        hollow(IDS)
    assert seen == [{"0"}, {"1"}]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_next_layer_is_read_from_the_disk_during_a_turn(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hollow, shelf_ = both(family, tmp_path)
    asked: list[list[tuple[str, str]]] = []
    monkeypatch.setattr(shelf, "read_ahead", lambda wanted: asked.append(list(wanted)))
    decoder = find_decoder(hollow)
    for index in range(2):
        with decoder.turn(index):
            pass
    (wanted,) = asked  # there is no third layer
    names = shelf_.units["model.layers.1"]
    assert [shelf_.places[name]["weight_name"] for name in names] == [name for _, name in wanted]
    read_ahead(wanted).join()
    stored = sum(end - begin for file in {file for file, _ in wanted} for begin, end in spans_of(file, wanted))
    assert stored == sum(parameter.numel() * 4 for parameter in hollow.model.layers[1].parameters())


def spans_of(file: str, wanted: list[tuple[str, str]]) -> list[tuple[int, int]]:
    return spans(file, [name for place, name in wanted if place == file])


def bytes_read() -> int:
    """Bytes that this process has asked the system for so far."""
    return int(next(row.split()[1] for row in Path("/proc/self/io").read_text().splitlines() if "rchar" in row))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="what was read is counted in /proc")
def test_read_ahead_reads_what_is_wanted_and_passes_over_what_is_not_there(tmp_path: Path) -> None:
    file = str(tmp_path / "weights.safetensors")
    tensors = {name: torch.randn(size) for name, size in (("a", 700_000), ("b", 3), ("c", 500_000), ("d", 10))}
    save_file(tensors, file)
    data = Path(file).read_bytes()
    ((begin, end),) = spans(file, ["d"])
    assert data[begin:end] == tensors["d"].numpy().tobytes()
    whole = spans(file, tensors)
    assert whole == [(len(data) - sum(tensor.nbytes for tensor in tensors.values()), len(data))]
    before = bytes_read()
    read_ahead([(file, "a"), (file, "c"), (str(tmp_path / "none"), "a")]).join()
    assert tensors["a"].nbytes + tensors["c"].nbytes <= bytes_read() - before < len(data) + 2**16
    read_ahead([(file, "e")]).join()


def test_what_is_changed_in_a_turn_is_lost_unless_it_was_written(tmp_path: Path) -> None:
    _, hollow, shelf = both("llama", tmp_path)
    decoder = find_decoder(hollow)
    with decoder.turn(0) as layer:
        before = layer.mlp.up_proj.weight.detach().clone()
        layer.mlp.up_proj.weight.data.zero_()
    with decoder.turn(0) as layer:
        assert torch.equal(layer.mlp.up_proj.weight, before)
        written = {f"model.layers.0.{name}": p.data + 1 for name, p in layer.named_parameters()}
    save_file(written, tmp_path / "layer.safetensors")
    shelf.moved("model.layers.0", tmp_path / "layer.safetensors")
    with decoder.turn(0) as layer:
        assert torch.equal(layer.mlp.up_proj.weight, before + 1)


def test_a_unit_that_is_out_stays_out_after_an_inner_block(tmp_path: Path) -> None:
    _, hollow, shelf = both("llama", tmp_path)
    with shelf.out("model.layers.0"):
        weight = hollow.model.layers[0].mlp.up_proj.weight
        with shelf.out("model.layers.0"), torch.no_grad():
            hollow(IDS)
        assert hollow.model.layers[0].mlp.up_proj.weight is weight
    assert not in_memory(hollow)


def test_ties_hold_on_the_shelf_and_off_it(tmp_path: Path) -> None:
    _, hollow, _ = both("gpt2", tmp_path)
    assert hollow.lm_head.weight is hollow.transformer.wte.weight
    with find_decoder(hollow).surroundings():
        assert hollow.lm_head.weight is hollow.transformer.wte.weight
        assert hollow.lm_head.weight.device.type == "cpu"
    assert hollow.lm_head.weight is hollow.transformer.wte.weight


def test_a_unit_goes_back_when_its_forward_fails(tmp_path: Path) -> None:
    _, hollow, _ = both("llama", tmp_path)
    hollow.model.layers[1].mlp.act_fn.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        hollow(IDS)
    assert not in_memory(hollow)
