"""Packed checkpoints through transformers' own door: `quant_method: "llmprune"`.

    import llmprune
    model = AutoModelForCausalLM.from_pretrained(packed_directory)

config.json says of every packed weight how it is packed:

    "quantization_config": {"quant_method": "llmprune", "format": 1, "weights": {
        "model.layers.0.mlp.up_proj.weight": {"pattern": "2:4", "shape": [1536, 576], "input_axis": 1, "kept": 442368}}}

The skeleton of the model gets a `SparseLinear` for each of them before anything is read (`placement.py`), so values and
index go straight from the file to their place, in shards, to any device. What no SparseLinear can stand for, experts
that are fused in one parameter before all, becomes dense weight by weight while it is loaded.

Nothing of transformers is imported by importing llmprune: `registration.py` imports this when transformers is there.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from llmprune.runtime.registration import METHOD, register  # before transformers, whose import asks for it here

# isort: split
import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.errors import UserError
from llmprune.runtime.no_gradient import refuse_backward
from llmprune.runtime.weight import UNPACKED
from llmprune.sparsity.pack import ANY

__all__ = ["METHOD", "LlmpruneConfig", "LlmpruneQuantizer", "register"]

FORMAT = 1
"""The newest layout that this version reads."""

logger = logging.get_logger("transformers.llmprune")  # below transformers' own, so that its verbosity counts


class LlmpruneConfig(QuantizationConfigMixin):
    """What config.json says of the packed weights.

    weights : by name on disk, each {"pattern": "2:4" or "any", "shape": as stored dense, "input_axis": its axis over
        the inputs, "kept": stored values}

    Raises
    ------
    UserError
        if this version of llmprune cannot read it.
    """

    def __init__(self, format: int = FORMAT, weights: dict[str, Any] | None = None, **others: Any) -> None:  # noqa: A002
        others.pop("quant_method", None)
        if others or not isinstance(format, int) or not 1 <= format <= FORMAT:
            told = f"format {format!r}" + (f" and {sorted(others)}" if others else "")
            raise UserError(f"this llmprune reads packed checkpoints of format {FORMAT}; got {told}: upgrade llmprune.")
        self.quant_method: Any = METHOD  # transformers' own methods are an enumeration, others their name
        self.format, self.weights = format, weights or {}
        if not isinstance(self.weights, dict):
            raise UserError(f"quantization_config.weights is a table; got {weights!r}: config.json is damaged.")
        for key, entry in self.weights.items():
            if not _is_entry(entry):
                raise UserError(
                    "each of quantization_config.weights has pattern, shape, input_axis and kept, which fit together; "
                    f"got {entry!r} for {key}: config.json is damaged."
                )


def _is_entry(entry: Any) -> bool:
    """Whether a SparseLinear can be made from it."""
    if not isinstance(entry, dict) or not {"pattern", "shape", "input_axis", "kept"} <= set(entry):
        return False
    pattern, shape, axis, kept = (entry[name] for name in ("pattern", "shape", "input_axis", "kept"))
    if not isinstance(shape, list | tuple) or not all(isinstance(number, int) for number in (*shape, axis, kept)):
        return False
    if not -len(shape) <= axis < len(shape) or min(*shape, kept) < 0:
        return False
    if pattern == ANY:
        return True
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    return found is not None and kept * int(found[2]) == math.prod(shape) * int(found[1])


class LlmpruneQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves a packed model."""

    quantization_config: LlmpruneConfig
    requires_calibration = True  # our weights come packed; transformers cannot pack a dense model on the fly

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: where there is no kernel, weights are held dense, with a notice."""

    @property
    def is_trainable(self) -> bool:
        """Packed weights compute no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Each product is one operator for torch.compile."""
        return True

    def is_serializable(self) -> bool:
        """`save_pretrained` writes a packed checkpoint again."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check the files' headers against the configuration; modules are replaced in `update_weight_conversions`."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise UserError(
                "a packed checkpoint cannot be split over devices by tensor parallelism; use device_map, or "
                "`llmprune unpack` it first."
            )
        if checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files):
            _check_files(self.quantization_config, checkpoint_files)
        self._model = model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Put a SparseLinear where each packed weight goes, and have the rest unpacked.

        transformers calls this when it has gathered its own conversions for the model, before any tensor is read;
        before release 5.20 without the model.
        """
        from llmprune.runtime.placement import place

        model = self._model if model is None else model
        self._placement = place(model, self.quantization_config.weights, list(weight_conversions))
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        if self._placement.dense:
            logger.warning(_notice(self._placement.dense))
        return self._placement.conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """What was read must fit together; then the model is as if transformers had loaded a dense one."""
        from llmprune.runtime.placement import check_loaded, sparse_linears

        check_loaded(model)
        _cast(model, self._dtypes)
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = self._placement.originals(conversions)
        setattr(model, UNPACKED, len(self._placement.dense))
        if sparse_linears(model):
            model.requires_grad_(False)
            self._refusal = model.register_forward_hook(refuse_backward)
        else:  # all became dense, so this is a dense model
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]  # transformers' own
        del self._model, self._placement, self._dtypes
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """For `save_pretrained`: the tensors as they are, and the configuration by the names they get on disk."""
        from llmprune.runtime.placement import entries

        self.quantization_config.weights = entries(model)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> nn.Module:
        """For `model.dequantize()`: plain linears again, one at a time.

        Another dtype is given to the whole model; its own must not be, for that would round what stays in float32.
        """
        from llmprune.runtime.placement import sparse_linears
        from llmprune.runtime.sparsify import densify

        if any(module.weight.is_meta for module in sparse_linears(model).values()):
            raise UserError(
                "parts of this model are offloaded, and only what is in memory can be made dense: load it without "
                "offloading (device_map), or use `llmprune unpack`."
            )
        densify(model)
        self._refusal.remove()
        if dtype not in (None, model.dtype):
            model.to(dtype)
        dense: nn.Module = model.requires_grad_(True)
        return dense


def _notice(names: list[str]) -> str:
    shown = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
    return (
        f"These packed weights are unpacked while they are loaded and take dense memory and time, because no module "
        f"multiplies with each of them alone: {shown}."
    )


def _check_files(config: LlmpruneConfig, files: list[str]) -> None:
    """Every packed weight must be in the files with its index, in shapes that fit; only headers are read."""
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 (no mapping)
    folder = Path(files[0]).parent
    for key, entry in config.weights.items():
        values, index = shapes.get(key), shapes.get(f"{key}_index")
        inputs = entry["shape"][entry["input_axis"]]
        rows = math.prod(entry["shape"]) // inputs if inputs else 0
        kept = [entry["kept"]] if entry["pattern"] == ANY else [rows, entry["kept"] // max(1, rows)]
        if values != kept or index != [rows, -(-inputs // 8)]:
            raise UserError(
                f"{folder} is damaged: {key} should be values of shape {kept} with an index of shape "
                f"{[rows, -(-inputs // 8)]}; got {values} and {index}."
            )


def _cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Weights in the dtype that was asked for: before release 5.20 transformers does not cast where it renames.

    What the model itself wants in float32 stays.
    """
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name)
        if wanted is None or parameter.dtype == wanted or parameter.is_meta or any(part in name for part in kept):
            continue
        parameter.data = parameter.data.to(wanted)


register()
