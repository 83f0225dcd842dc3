"""Files of weights whose tensors come one by one.

Names, dtypes and shapes of all tensors are known without reading one. So a file's header is written first, and each
tensor goes to its place, in whatever order they come. A model that rests on a shelf is written so, as `save_pretrained`
would write it, a decoder layer at a time: its tensors are sent through transformers' own conversion layer by layer.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.checkpoint.layout import hollow_tensors, saved_tensors
from llmprune.checkpoint.stream import DTYPES, INDEX, WEIGHTS

__all__ = ["TensorFile", "write_shards"]


def write_shards(model: PreTrainedModel, directory: Path, *, max_shard_size: str) -> None:
    """Write the files with weights, and their index if there are several."""
    outlines = hollow_tensors(model)
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(outlines, filename_pattern=pattern, max_shard_size=max_shard_size)
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(TensorFile(directory / file, {name: outlines[name] for name in names}))
            for file, names in split.filename_to_tensors.items()
        }
        for name, tensor in saved_tensors(model):
            files[split.tensor_to_filename[name]].put(name, tensor)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class TensorFile:
    """A safetensors file with a finished header, and its tensors under way.

    `outlines` are tensors of the same names, dtypes and shapes; their numbers are not looked at. Larger dtypes come
    first in the file: readers view the data as numbers in place.
    """

    def __init__(self, path: Path, outlines: dict[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(outlines, key=lambda name: (-outlines[name].element_size(), name)):
            tensor = outlines[name]
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _kind(tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
            self._places[name] = start, end
        written = json.dumps(header, separators=(",", ":")).encode()
        written = written.ljust(-(-len(written) // 8) * 8)
        self._data = 8 + len(written)
        self._file = path.open("wb")
        self._file.write(len(written).to_bytes(8, "little") + written)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place."""
        start, end = self._places.pop(name)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert len(data) == end - start, (name, len(data), end - start)
        self._file.seek(self._data + start)
        self._file.write(data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._places, f"{next(iter(self._places))} was never written"


def _kind(tensor: Tensor) -> str:
    """The dtype's name in a header."""
    return DTYPES.get(tensor.dtype) or _OTHERS[tensor.dtype]


_OTHERS = {torch.bool: "BOOL", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
"""What buffers may be."""
