"""Packed checkpoints through transformers' own door: the same model, in less memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.errors import UserError
from llmprune.model import quiet_transformers
from llmprune.runtime import dispatch
from llmprune.runtime.placement import sparse_linears
from llmprune.runtime.sparsify import densify, sparsify
from tests.packed_models import Pair, packed_pair

assert llmprune  # importing it is what makes the checkpoints load

FUSED = {"mixtral", "qwen3_moe", "gpt_oss"}
FAMILIES = ["llama", "gpt2", "opt", "falcon", *sorted(FUSED)]
IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 4, 8, 21, 40, 3]])


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """`packed_pair`, each made once."""
    made: dict[Any, Pair] = {}

    def pair(family: str, **settings: Any) -> Pair:
        key = (family, *sorted(settings.items()))
        if key not in made:
            made[key] = packed_pair(family, tmp_path_factory.mktemp(family), **settings)
        return made[key]

    return pair


def load(directory: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_the_dense_one_does(family: str, pair_of: Callable[..., Pair]) -> None:
    pair = pair_of(family)
    packed, dense = load(pair.packed), load(pair.dense)
    expected = logits(dense)
    torch.testing.assert_close(logits(packed), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    fused = {key for key in pair.packed_keys if "experts" in key}
    assert bool(fused) == (family in FUSED)
    assert len(sparse_linears(packed)) == len(pair.packed_keys) - len(fused)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_where_weights_are_expanded_the_result_has_the_same_bits(
    family: str, pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "choose", lambda *arguments: "expand")
    pair = pair_of(family, dtype=torch.bfloat16)
    assert torch.equal(logits(load(pair.packed)), logits(load(pair.dense)))


def test_greedy_text_is_the_same(pair_of: Callable[..., Pair]) -> None:
    pair = pair_of("llama")
    told = [
        load(path).generate(IDS, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        for path in (pair.packed, pair.dense)
    ]
    assert torch.equal(*told)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sharded_checkpoint_loads_with_a_device_map(family: str, pair_of: Callable[..., Pair]) -> None:
    pair = pair_of(family, shard="20KB")
    assert len(list(pair.packed.glob("*.safetensors"))) > 2
    model = load(pair.packed, device_map="auto")
    torch.testing.assert_close(logits(model).cpu(), logits(load(pair.dense)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_another_dtype_than_stored(family: str, pair_of: Callable[..., Pair]) -> None:
    pair = pair_of(family, dtype=torch.bfloat16)
    model = load(pair.packed, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = logits(load(pair.dense, dtype=torch.float32))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


class Created(TorchDispatchMode):
    """The shapes of all tensors with memory that come into being."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return result


def test_no_dense_copy_of_a_weight_is_made(pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all of it in this thread, where it is seen
    pair = pair_of("opt")
    about = json.loads((pair.packed / "config.json").read_text())["quantization_config"]["weights"]
    dense_shapes = {tuple(entry["shape"]) for entry in about.values()}
    with Created() as created:
        packed = load(pair.packed)
    assert not created.shapes & dense_shapes
    with Created() as created:
        load(pair.dense)
    assert dense_shapes <= created.shapes  # the check can fail
    held = sum(tensor.nbytes for tensor in [*packed.parameters(), *packed.buffers()])
    assert held < 0.85 * sum(tensor.nbytes for tensor in load(pair.dense).parameters())


def test_fused_experts_are_told_of_once(
    pair_of: Callable[..., Pair], transformers_log: pytest.LogCaptureFixture
) -> None:
    load(pair_of("mixtral").packed)
    (told,) = [message for message in transformers_log.messages if "unpacked while" in message]
    assert "experts.0.w1.weight and 23 more" in told


def test_who_silences_transformers_is_not_told_of_fused_experts(
    pair_of: Callable[..., Pair], transformers_log: pytest.LogCaptureFixture
) -> None:
    with quiet_transformers():
        load(pair_of("mixtral").packed)
    assert not [message for message in transformers_log.messages if "unpacked while" in message]


def test_some_experts_stored_dense_among_packed_ones(pair_of: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pair_of("qwen3_moe")
    (tmp_path / "config.json").write_bytes((pair.packed / "config.json").read_bytes())
    tensors, dense = load_file(pair.packed / "model.safetensors"), load_file(pair.dense / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in [key for key in pair.packed_keys if "experts.1." in key or "experts.2.up" in key]:
        tensors[key] = dense[key]
        del tensors[f"{key}_index"], config["quantization_config"]["weights"][key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = logits(load(pair.dense))
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_an_index_follows_its_weight_through_renamings(pair_of: Callable[..., Pair], tmp_path: Path) -> None:
    """transformers renames by patterns that end with the weight's name and so do not touch the index."""
    old, new = "self_attn.q_proj.weight", "self_attn.query.weight"

    def renamed(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for held in (tensors, config["weights"]):
            for key in [key for key in held if old in key]:
                held[key.replace(old, new)] = held.pop(key)

    path = damaged(pair_of("llama"), tmp_path, renamed)
    model = load(path, key_mapping={new: old})
    assert torch.equal(logits(model), logits(load(pair_of("llama").packed)))
    model.save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["weights"]
    written = load_file(tmp_path / "again" / "model.safetensors")
    assert set(kept) == set(json.loads((path / "config.json").read_text())["quantization_config"]["weights"])
    assert all(key in written and f"{key}_index" in written for key in kept)


def test_the_model_without_its_head(pair_of: Callable[..., Pair]) -> None:
    for family in ("llama", "gpt2"):
        pair = pair_of(family)
        with torch.inference_mode():
            packed, dense = (AutoModel.from_pretrained(path)(IDS)[0] for path in (pair.packed, pair.dense))
        torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-5)


def test_what_is_offloaded_is_not_held_after_its_forward(pair_of: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pair_of("llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(pair.packed, device_map=places, offload_folder=tmp_path)
    stays, goes = (sparse_linears(model)[f"model.layers.{layer}.mlp.up_proj"] for layer in (0, 1))
    assert goes.weight.is_meta
    assert torch.equal(logits(model), logits(load(pair.packed)))
    assert goes._source is goes._weight is None
    assert stays._source is stays.weight
    with pytest.raises(UserError, match="parts of this model are offloaded"):
        model.dequantize()


# Saving again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_packed_model_is_saved_packed(family: str, pair_of: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pair_of(family)
    model = load(pair.packed)
    logits(model)  # running adds nothing that is saved
    model.save_pretrained(tmp_path)
    weights = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["weights"]
    before = json.loads((pair.packed / "config.json").read_text())["quantization_config"]["weights"]
    kept = {key: entry for key, entry in before.items() if "experts" not in key}  # those became dense
    assert weights == kept
    stored, written = load_file(pair.packed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    for key in kept:
        assert torch.equal(written[key], stored[key])
        assert torch.equal(written[f"{key}_index"], stored[f"{key}_index"])
    assert torch.equal(logits(load(tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_is_made_dense_is_saved_dense(family: str, pair_of: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pair_of(family, dtype=torch.bfloat16)
    model = load(pair.packed)
    model.dequantize()
    assert not sparse_linears(model)
    assert torch.equal(logits(model), logits(load(pair.dense)))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    written, dense = load_file(tmp_path / "model.safetensors"), load_file(pair.dense / "model.safetensors")
    assert written.keys() == dense.keys()
    assert all(torch.equal(written[key], dense[key]) for key in dense)


def test_made_dense_or_packed_one_linear_at_a_time(
    pair_of: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a linear's turn comes, those before it are gone."""
    model = load(pair_of("llama").packed)
    for change in (densify, sparsify):
        gone: list[weakref.ref[Any]] = []
        replaced = nn.Module.set_submodule

        def put(root: Any, name: str, new: Any, gone: Any = gone, replaced: Any = replaced) -> None:
            assert all(each() is None for each in gone[:-1])
            gone.append(weakref.ref(root.get_submodule(name).weight))
            replaced(root, name, new)

        monkeypatch.setattr(nn.Module, "set_submodule", put)
        change(model)
        monkeypatch.undo()
        assert len(gone) > 3


def test_packing_in_memory_and_back(pair_of: Callable[..., Pair]) -> None:
    model = load(pair_of("gpt2").dense)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = logits(model)
    assert sparsify(model) == len(pair_of("gpt2").packed_keys)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    densify(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


# What is refused ------------------------------------------------------------------------------------------------------


def damaged(pair: Pair, folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    tensors = load_file(pair.packed / "model.safetensors")
    config = json.loads((pair.packed / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KEY = "model.layers.0.mlp.up_proj.weight"


def without_index(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[f"{KEY}_index"]


def without_values(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors[KEY]


def one_bit_more(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    index = tensors[f"{KEY}_index"]
    index[3, 1] = 255


def from_the_future(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["format"] = 2


def entry_without_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del config["weights"][KEY]["shape"]


def weights_as_a_list(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["weights"] = [KEY]


def entry_with(**settings: Any) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["weights"][KEY] |= settings

    return change


def any_where_it_is_2_of_4(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    next(entry for entry in config["weights"].values() if entry["pattern"] == "2:4")["pattern"] = "any"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_index, KEY),
        (without_values, KEY),
        (one_bit_more, "up_proj.weight does not fit"),
        (from_the_future, "upgrade"),
        (entry_without_shape, KEY),
        (weights_as_a_list, "is a table"),
        (entry_with(shape=None), KEY),
        (entry_with(shape=[48.5, 32]), KEY),
        (entry_with(shape=[]), KEY),
        (entry_with(input_axis="1"), KEY),
        (entry_with(pattern="9:9"), KEY),
        (entry_with(pattern=7), KEY),
        (entry_with(kept=None), KEY),
        (any_where_it_is_2_of_4, r"values of shape \[\d+\]"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    change: Callable[..., None], told: str, pair_of: Callable[..., Pair], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        load(damaged(pair_of("llama"), tmp_path, change))


def test_no_gradient_is_wanted_by_a_loaded_model(pair_of: Callable[..., Pair]) -> None:
    model = load(pair_of("llama").packed)
    model(IDS)  # without no_grad: nothing in the model asks for one
    with pytest.raises(UserError, match="dequantize"):
        model(inputs_embeds=torch.zeros(1, 3, 32, requires_grad=True))


@pytest.mark.parametrize("as_tuple", [False, True], ids=["named", "tuple"])
def test_a_backward_pass_is_refused_in_words(as_tuple: bool, pair_of: Callable[..., Pair]) -> None:
    model = load(pair_of("llama").packed)
    loss, scores = model(IDS, labels=IDS, return_dict=not as_tuple, use_cache=False)[:2]
    for found in (loss, scores):
        with pytest.raises(UserError, match=r"computes no gradients; got a backward pass\. Train the dense model"):
            found.sum().backward()
    with torch.no_grad():
        assert not model(IDS).logits.requires_grad


def test_a_model_that_is_made_dense_can_be_trained(pair_of: Callable[..., Pair]) -> None:
    model = load(pair_of("llama").packed)
    model.dequantize()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(False)
    assert not model(IDS).logits.requires_grad


def test_compiled_models_compute_the_same(pair_of: Callable[..., Pair]) -> None:
    model = load(pair_of("llama").packed)
    expected = logits(model)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="aot_eager")(IDS).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)


# Registration ---------------------------------------------------------------------------------------------------------

KNOWN = (
    "import sys, transformers.quantizers.auto as auto\n"
    "assert auto.AUTO_QUANTIZER_MAPPING['llmprune'] and auto.AUTO_QUANTIZATION_CONFIG_MAPPING['llmprune']\n"
    "left = [finder for finder in sys.meta_path if type(finder).__module__.startswith('llmprune')]\n"
    "assert not left, left\n"
    "import importlib, llmprune; importlib.reload(llmprune)\n"
    "assert auto.AUTO_QUANTIZER_MAPPING['llmprune'].__module__ == 'llmprune.runtime.transformers_plugin'"
)


@pytest.mark.parametrize("first", ["import llmprune", "import transformers.quantizers.auto; import llmprune"])
def test_either_may_be_imported_first(first: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", f"{first}\n{KNOWN}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_configuration_is_read_back_from_a_pickle_in_a_fresh_process(
    pair_of: Callable[..., Pair], tmp_path: Path
) -> None:
    """As a process gets it that another one has started: the plugin is then what imports transformers."""
    config = load(pair_of("llama").packed).config.quantization_config
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    program = "import pickle; read = pickle.load(open('config.pickle', 'rb')); print(len(read.weights))\n" + KNOWN
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "14\n"
