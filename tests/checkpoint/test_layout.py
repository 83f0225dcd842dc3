"""Names, axes and bytes on disk, for families that are stored as they are, transposed, tied, fused and split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune.checkpoint.layout import SavedWeight, digest, fingerprint, saved_tensors, saved_ties, saved_weights
from llmprune.errors import UnsupportedModel
from tests.builders import FAMILIES, tiny_model
from tests.checkpoint.pruning import rows_of_model


def on_disk(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                yield name, file.get_tensor(name)


def saved_and_loaded(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    model.save_pretrained(directory)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reloaded", [False, True], ids=["from_config", "from_pretrained"])
def test_names_and_bytes_are_those_of_the_files(family: str, reloaded: bool, tmp_path: Path) -> None:
    model = tiny_model(family, torch.bfloat16)
    if reloaded:
        model = saved_and_loaded(model, tmp_path / "first")
        assert model._weight_conversions is not None
    model.save_pretrained(tmp_path / "saved")
    assert fingerprint(model) == {name: digest(tensor) for name, tensor in on_disk(tmp_path / "saved")}


def test_tensors_that_are_saved_as_they_are_are_not_copied() -> None:
    model = tiny_model("llama")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(tensor.data_ptr() in own for _, tensor in saved_tensors(model))


def test_a_layer_at_a_time_is_as_good_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.checkpoint import layout

    model = tiny_model("mixtral")
    sizes: list[int] = []
    whole = layout.revert_weight_conversion

    def counting(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes.append(sum(tensor.numel() for tensor in state.values() if tensor.device.type != "meta"))
        return whole(model, state)

    monkeypatch.setattr(layout, "revert_weight_conversion", counting)
    names = {name for name, _ in saved_tensors(model)}
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in names
    assert max(sizes) < 0.6 * sum(parameter.numel() for parameter in model.parameters())


def test_a_digest_tells_dtype_shape_and_every_bit() -> None:
    tensor = torch.zeros(4, 2)
    others = [tensor.view(2, 4), tensor.half(), -tensor, torch.zeros(4, 2, dtype=torch.int32)]
    assert len({digest(other) for other in [tensor, *others]}) == 5
    assert digest(torch.zeros(2, 4).T) == digest(tensor)


def test_ties_are_named(tmp_path: Path) -> None:
    assert saved_ties(tiny_model("gpt2")) == {"lm_head.weight": "transformer.wte.weight"}
    assert saved_ties(tiny_model("llama")) == {}
    assert saved_ties(saved_and_loaded(tiny_model("gpt2"), tmp_path)) == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reloaded", [False, True], ids=["from_config", "from_pretrained"])
def test_every_weight_is_found_on_disk_along_its_inputs(family: str, reloaded: bool, tmp_path: Path) -> None:
    """Number the elements of each weight; wherever they lie on disk, each row must count on along the inputs."""
    model = tiny_model(family)
    if reloaded:
        model = saved_and_loaded(model, tmp_path)
    rows = rows_of_model(model)
    for row in rows:
        weight = dict(model.named_parameters())[row.parameter].data
        matrix = weight if row.expert is None else weight[row.expert]
        oriented = matrix if row.input_axis == 1 else matrix.T
        oriented.copy_(torch.arange(oriented.numel(), dtype=torch.float32).view(oriented.shape))
    held = saved_weights(model, rows)
    tensors = dict(saved_tensors(model))
    seen: dict[str, list[float]] = {row.name: [] for row in rows}
    for name, weights in held.items():
        for saved in weights:
            values = saved.rows_of(tensors[name])
            assert torch.equal(values.diff(dim=1), torch.ones_like(values[:, 1:]))
            seen[saved.weight] += values[:, 0].tolist()
    for row in rows:
        assert sorted(seen[row.name]) == [float(i * row.shape[1]) for i in range(row.shape[0])], row.name


def test_a_fused_weight_is_found_in_its_parts() -> None:
    model = tiny_model("mixtral")
    held = saved_weights(model, rows_of_model(model))
    name = "model.layers.1.mlp.experts.gate_up_proj[2]"
    places = {saved.tensor for weights in held.values() for saved in weights if saved.weight == name}
    assert places == {f"model.layers.1.block_sparse_moe.experts.2.{part}.weight" for part in ("w1", "w3")}


def test_experts_that_stay_together_have_a_box_each() -> None:
    model = tiny_model("gpt_oss")
    held = saved_weights(model, [row for row in rows_of_model(model) if row.expert == 3])
    (saved,) = held["model.layers.0.mlp.experts.down_proj"]
    assert saved == SavedWeight(
        weight="model.layers.0.mlp.experts.down_proj[3]",
        tensor="model.layers.0.mlp.experts.down_proj",
        input_axis=1,
        box=((3, 4), (0, 48), (0, 32)),
        pattern="2:4",
        scope="group",
    )


def test_weights_that_are_fused_on_disk_have_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose files hold q, k and v as one tensor, here transposed and with room before it."""
    from llmprune.checkpoint import layout

    parts = ("q_proj", "k_proj", "v_proj")

    def fusing(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        attention = "model.layers.0.self_attn."
        taken = [state[f"{attention}{part}.weight"] for part in parts if f"{attention}{part}.weight" in state]
        saved = {name: tensor for name, tensor in state.items() if tensor not in set(taken)}
        if taken:
            saved["fused"] = torch.stack([torch.zeros_like(joined := torch.cat(taken)), joined]).transpose(1, 2)
        return saved

    monkeypatch.setattr(layout, "revert_weight_conversion", fusing)
    model = tiny_model("llama")
    held = {saved.weight: saved for saved in saved_weights(model, rows_of_model(model))["fused"]}
    tensor = dict(saved_tensors(model))["fused"]
    for part, rows in zip(parts, [(0, 32), (32, 48), (48, 64)], strict=True):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert held[name].box == ((1, 2), (0, 32), rows)
        assert held[name].input_axis == 1
        assert torch.equal(held[name].rows_of(tensor), model.get_parameter(name))


def test_an_order_that_breaks_the_pattern_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmprune.checkpoint import layout

    def reversed_inputs(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.flip(-1) if "q_proj" in name else tensor for name, tensor in state.items()}

    monkeypatch.setattr(layout, "revert_weight_conversion", reversed_inputs)
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj.*skip this weight"):
        saved_weights(model, rows_of_model(model))
