"""Checkpoints rewritten tensor by tensor: however large they are, no more than one tensor is held in memory.

A safetensors file is eight bytes with the length of its header, the header (JSON: name → dtype, shape, place in the
data), and the data without a gap. Its library writes a file from all its tensors at once. Here room for the header is
left at the beginning and filled at the end, blanks behind it, as the format allows. Readers view the data as numbers
in place, so larger dtypes must come before smaller ones: tensors of one byte an element, such as the bitmaps of packed
weights, wait in a scratch file until the others are through.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.errors import UserError

__all__ = [
    "DTYPES",
    "INDEX",
    "WEIGHTS",
    "Source",
    "Turn",
    "copy_others",
    "element_size",
    "header_room",
    "read_json",
    "rewrite",
    "write_json",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_OTHER_FORMS = (
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "consolidated*",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rust_model.ot",
    "*.onnx",
    "*.onnx_data",
    "openvino_model*",
    "*.gguf",
)
"""The same weights once more, as repositories on the Hub hold them for other programs: what is rewritten here would
stand beside a copy of what it was."""

Turn = Callable[[str], Iterable[tuple[str, Tensor]] | None]
"""What stands in place of the source's tensor of this name: others, under their names, or None for itself."""

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""What tensors that are written anew may be, and how a header calls it."""

_ROOM_PER_TENSOR, _ROOM_PER_SIDE = 96, 16  # in the header, besides the name: dtype, offsets and words; each number


class Source:
    """The tensors of the checkpoint in `directory`, read one at a time.

    Raises
    ------
    UserError
        if there are no safetensors files, one is missing or damaged, or two hold tensors of the same name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sharded = not (directory / WEIGHTS).is_file()
        self.files = _shard_files(directory)
        self._open: tuple[str, Any] = ("", None)
        self.places: dict[str, str] = {}
        """Name of a tensor → the file that it lies in."""
        for file in self.files:
            names = list(self._handle(file).keys())
            if twice := self.places.keys() & names:
                raise UserError(f"{directory} holds {min(twice)} in {file} and in another file: it is damaged.")
            self.places |= dict.fromkeys(names, file)

    @property
    def nbytes(self) -> int:
        """Bytes of all files with weights."""
        return sum((self.directory / file).stat().st_size for file in self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def get(self, name: str) -> Tensor:
        """The tensor of that name, which must exist."""
        tensor: Tensor = self._handle(self.places[name]).get_tensor(name)
        return tensor

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype, as headers call it, and shape; without reading the tensor."""
        held = self._handle(self.places[name]).get_slice(name)
        return held.get_dtype(), tuple(held.get_shape())

    def metadata(self, file: str) -> dict[str, str]:
        """What the file says of itself."""
        return self._handle(file).metadata() or {}

    def _handle(self, file: str) -> Any:
        """The open file; only the last one is kept open, and mapped."""
        if self._open[0] != file:
            self._open = ("", None)
            try:
                self._open = (file, safe_open(self.directory / file, "pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.directory / file} cannot be read ({error}): get the file again.") from error
        return self._open[1]


def element_size(dtype: str) -> int:
    """Bytes of an element, from the dtype's name in a header: BF16, F8_E4M3, BOOL; 1 for what is smaller still."""
    bits = "".join(letter for letter in dtype.partition("_")[0] if letter.isdigit())
    return max(1, int(bits or 8) // 8)


def rewrite(source: Source, directory: Path, turn: Turn) -> None:
    """Write the files of `source` into `directory` under their names, every tensor replaced by what `turn` gives.

    The index of the shards, if there is one, is made anew. Neighbours of the weights are left to `copy_others`.
    """
    places: dict[str, str] = {}
    total = 0
    for file in source.files:
        names = [name for name, place in source.places.items() if place == file]
        names.sort(key=lambda name: -element_size(source.kind(name)[0]))
        with _ShardWriter(directory / file, _room(source, names), source.metadata(file)) as writer:
            for name in names:
                _write(writer, source, name, turn)  # a function, so that its tensors are gone before the next ones
        places |= dict.fromkeys(writer.header, file)
        total += writer.nbytes
    if source.sharded:
        metadata = {**read_json(source.directory / INDEX).get("metadata", {}), "total_size": total}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def copy_others(source: Source, directory: Path, *, but: Sequence[str]) -> None:
    """Copy what lies beside the weights, folders too.

    Hidden files, those named in `but`, and the same weights in other forms stay behind.
    """
    left = {*source.files, *but}
    for path in sorted(source.directory.rglob("*")):
        place = path.relative_to(source.directory)
        behind = any(fnmatchcase(part, pattern) for part in place.parts for pattern in (".*", *_OTHER_FORMS))
        if behind or str(place) in left or path.is_dir():
            continue
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / place)  # follows the links of a snapshot in the Hub's cache


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    UserError
        if there is no such file, or something else is in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): a checkpoint's directory has one.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object: a checkpoint's directory has one there.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as transformers writes its own, in the order that it has."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _room(source: Source, names: Iterable[str]) -> int:
    """Bytes that are enough for the names' header: a packed weight is two tensors of no more sides."""
    return sum(header_room(name, len(source.kind(name)[1])) for name in names)


def header_room(name: str, sides: int) -> int:
    """Bytes that a header of ours has for a tensor with so many sides, and for its index if it is packed."""
    return 2 * (len(json.dumps(name)) + _ROOM_PER_TENSOR + _ROOM_PER_SIDE * sides)


def _write(writer: _ShardWriter, source: Source, name: str, turn: Turn) -> None:
    new = turn(name)
    if new is None:
        writer.add(name, source.get(name), *source.kind(name))
    for other, tensor in new or ():
        writer.add(other, tensor, DTYPES[tensor.dtype], tuple(tensor.shape))


def _shard_files(directory: Path) -> list[str]:
    """Names of the files that `from_pretrained` would read. A single file goes before an index."""
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (directory / INDEX).is_file():
        raise UserError(
            f"{directory} holds no {WEIGHTS} and no {INDEX}: give the directory of a checkpoint in safetensors."
        )
    shards = read_json(directory / INDEX).get("weight_map")
    files = sorted(set(shards.values())) if isinstance(shards, dict) else []
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(f"{directory / INDEX} names no files beside it: it is damaged.")
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise UserError(f"{directory / missing[0]} is missing, and {INDEX} names it: get the file again.")
    return files


class _ShardWriter:
    """A safetensors file under way. The tensors come in the order of falling element sizes."""

    def __init__(self, path: Path, room: int, metadata: dict[str, str]) -> None:
        self.header: dict[str, Any] = {}
        self.nbytes = 0
        self._metadata = metadata
        self._least = 8
        self._room = -(-(room + len(json.dumps(metadata)) + 32) // 8) * 8
        self._file = path.open("wb")
        self._file.seek(8 + self._room)
        self._late = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed in __exit__
        self._late_names: list[str] = []

    def add(self, name: str, tensor: Tensor, dtype: str, shape: tuple[int, ...]) -> None:
        """Append a tensor: its bytes, and `dtype` and `shape` as the header shall have them."""
        size = element_size(dtype)
        if size == 1:
            self._late_names.append(name)
        else:
            assert size <= self._least, f"{name} of {size} bytes an element after one of {self._least}"
            self._least = size
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert name not in self.header, name
        self.header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, len(data)]}
        (self._late if size == 1 else self._file).write(data)
        self.nbytes += len(data)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file, self._late:
            if kind is None:
                self._late.seek(0)
                shutil.copyfileobj(self._late, self._file, 2**22)
                self._write_header()

    def _write_header(self) -> None:
        end = 0
        late = set(self._late_names)
        for name in [*(name for name in self.header if name not in late), *self._late_names]:
            place = self.header[name]["data_offsets"]
            place[:] = end, end + place[1]
            end = place[1]
        written = json.dumps({"__metadata__": self._metadata, **self.header}, separators=(",", ":")).encode()
        assert len(written) <= self._room, (len(written), self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + written.ljust(self._room))
