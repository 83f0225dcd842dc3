"""Reads the sparse checkpoints that compressed-tensors wrote up to 0.14, and that nothing else reads any more.

Its formats `sparse-bitmask` and `sparse-24-bitmask` keep a weight `X.weight` as `X.compressed` (the values, all in a
row or as (rows, columns / 2)), `X.bitmask` (uint8, little-endian bits, each row padded to whole bytes) and `X.shape`;
the first has `X.row_offsets` besides. Newer releases dropped the readers, and transformers then fills such weights
with random numbers after a warning. The bitmap is laid out as our own, so only names and shapes need translating.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor

from llmprune.checkpoint.stream import DTYPES, Source, element_size
from llmprune.errors import UserError
from llmprune.sparsity.pack import ANY, Packed, unpack

__all__ = ["ORPHAN", "Bitmasks"]

ORPHAN = ("quantization_config", "compression_config", "sparsity_config")
"""Where a config.json says that its weights are not plain: the second and third are how it was said before."""

_FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
_VALUES, _BITMASK, _SHAPE, _OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"


class Bitmasks:
    """Reads the bitmask checkpoint in `source`.

    Raises
    ------
    UserError
        if it is not one, is quantized besides, or parts of it are missing.
    """

    config_keys = ORPHAN
    """What goes from config.json when the checkpoint is dense."""

    def __init__(self, source: Source, config: Mapping[str, Any]) -> None:
        self.source = source
        form = _format_of(config, str(source.directory))
        self._stems = [name.removesuffix(_VALUES) for name in source.places if name.endswith(_VALUES)]
        if not self._stems:
            raise UserError(f"{source.directory} says {form} and holds no tensor *{_VALUES}: get the files again.")
        self._parts = {stem + part for stem in self._stems for part in (_BITMASK, _SHAPE, _OFFSETS)}
        self.patterns = {form: len(self._stems)}
        for stem in self._stems:
            self._check(stem)

    @property
    def growth(self) -> int:
        """Bytes that the dense tensors take more."""
        more = 0
        for stem in self._stems:
            dtype, shape = self.source.kind(stem + _VALUES)
            more += (prod(self._shape(stem)) - prod(shape)) * element_size(dtype)
        return more

    def turn(self, name: str) -> list[tuple[str, Tensor]] | None:
        """A `stream.Turn`."""
        if name in self._parts:
            return []
        if not name.endswith(_VALUES):
            return None
        stem = name.removesuffix(_VALUES)
        return [(_dense_name(stem), self._dense(stem))]

    def _check(self, stem: str) -> None:
        for part in (_BITMASK, _SHAPE):
            if stem + part not in self.source:
                raise UserError(
                    f"{self.source.directory} holds {stem}{_VALUES} and no {stem}{part}: get the files again."
                )
        if _dense_name(stem) in self.source:
            raise UserError(f"{self.source.directory} holds {stem}{_VALUES} and {_dense_name(stem)}: it is damaged.")
        dtype, _ = self.source.kind(stem + _VALUES)
        if dtype not in DTYPES.values():
            raise UserError(
                f"{stem}{_VALUES} is {dtype}: the checkpoint is quantized as well as sparse, and llmprune reads values "
                "in 16 bits and more only. Use compressed-tensors 0.14 with transformers 4."
            )

    def _shape(self, stem: str) -> tuple[int, ...]:
        return tuple(self.source.get(stem + _SHAPE).flatten().tolist())

    def _dense(self, stem: str) -> Tensor:
        shape, values = self._shape(stem), self.source.get(stem + _VALUES).flatten()
        bitmask = self.source.get(stem + _BITMASK)
        rows, columns = prod(shape[:-1]), shape[-1] if shape else 0
        width = -(-columns // 8)
        if bitmask.numel() != rows * width:
            raise UserError(
                f"{stem}{_BITMASK} has {bitmask.numel()} bytes, and shape {shape} needs {rows * width}: "
                "the file is damaged."
            )
        try:
            return unpack(Packed(values, bitmask.reshape(rows, width), ANY, columns)).view(shape)
        except UserError as error:
            raise UserError(f"{_dense_name(stem)}: {error}") from error


def _dense_name(stem: str) -> str:
    return stem if stem.endswith(".weight") else f"{stem}.weight"


def _format_of(config: Mapping[str, Any], where: str) -> str:
    """The bitmask format of a checkpoint that is nothing but sparse."""
    block = next((config[key] for key in ORPHAN[:2] if isinstance(config.get(key), dict)), None)
    if block is None and isinstance(config.get("sparsity_config"), dict):
        block = {"sparsity_config": config["sparsity_config"]}
    if block is None:
        raise UserError(f"{where} is dense already: its config.json has no quantization_config, so unpack has no work.")
    method = block.get("quant_method", "compressed-tensors")
    form = (block.get("sparsity_config") or {}).get("format")
    if method != "compressed-tensors" or form not in _FORMATS:
        raise UserError(
            f"{where} is {method}{f' ({form})' if form else ''}; unpack reads what `llmprune pack` wrote, and "
            f"{' and '.join(_FORMATS)} of compressed-tensors up to 0.14."
        )
    if block.get("config_groups"):
        raise UserError(
            f"{where} is quantized ({block.get('format') or 'config_groups'}) as well as {form}; unpack reads sparse "
            "weights that are not quantized. Use compressed-tensors 0.14 with transformers 4."
        )
    return str(form)
