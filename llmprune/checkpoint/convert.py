"""Whole checkpoints packed and unpacked: a directory in, a directory out, tensor by tensor.

    dense directory ── pack ──► packed directory ── unpack ──► the same tensors, bit for bit
    bitmasks of compressed-tensors ≤ 0.14 ──────── unpack ──► dense

Files keep their names and boundaries; what lies beside the weights is copied; config.json gains or loses its
`quantization_config` and is otherwise as it was. The output appears at once and whole, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint.card import refresh_card
from llmprune.checkpoint.packed import (
    METHOD,
    Entry,
    dense_tensor,
    index_name,
    pack_tensor,
    packed_config,
    packed_entries,
)
from llmprune.checkpoint.report import REPORT, Report
from llmprune.checkpoint.rescue import ORPHAN, Bitmasks
from llmprune.checkpoint.stream import (
    Source,
    copy_others,
    element_size,
    read_json,
    rewrite,
    write_json,
)
from llmprune.checkpoint.target import check_output, publish, write_errors
from llmprune.errors import UserError, VerificationError
from llmprune.report.document import PAGE

__all__ = ["Conversion", "pack_checkpoint", "pack_files", "unpack_checkpoint"]

_CONFIG = "config.json"


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint."""

    directory: Path
    """Where the result is."""
    before: int
    """Bytes of its files with weights, before."""
    after: int
    tensors: int
    """How many dense tensors it holds, packed or not."""
    patterns: dict[str, int] = field(default_factory=dict)
    """How many of them are packed (or were, after unpacking), by pattern: "2:4", "any"."""
    notes: tuple[str, ...] = ()
    """What a reader should know, in sentences."""


def pack_checkpoint(source: Path, target: Path, *, overwrite: bool = False) -> Conversion:
    """Pack the checkpoint in `source` into `target`, and prove by reading it back that no bit was lost.

    With llmprune's report in `source` the tensors are packed that it says were pruned; in a foreign checkpoint, all of
    two axes and more that become smaller.

    Raises
    ------
    UserError
        if `source` is no dense checkpoint in safetensors, nothing in it would become smaller, or `target` is taken.
    VerificationError
        if what was written is not what was read.
    """
    source = Path(source)
    _check_dense(read_json(source / _CONFIG), source)
    target = check_output(target, overwrite=overwrite, source=source, need_bytes=Source(source).nbytes)
    with publish(target, overwrite=overwrite) as staging:
        done = pack_files(source, staging, into=target)
        if not done.patterns:
            raise UserError(
                f"{source} holds no weight with enough zeros to become smaller: the bitmap costs a bit an entry, so "
                "more than 1 in 16 of a 16-bit weight must be zero. Prune it first."
            )
        _prove(Source(source), staging)
    return done


def pack_files(source: Path, directory: Path, *, into: Path | None = None) -> Conversion:
    """Pack the checkpoint in `source` into `directory`, which exists and is empty but for hidden files.

    If nothing became smaller the result is dense, without a `quantization_config`. `into` is the name that the result
    will have in the end.

    Raises
    ------
    UserError
        if the files of `source` are damaged or `directory` cannot be written.
    """
    opened, config = Source(source), read_json(source / _CONFIG)
    records = Report.read(source).tensors if (source / REPORT).is_file() else None
    entries: dict[str, Entry] = {}

    def turn(name: str) -> list[tuple[str, Tensor]] | None:
        record = None if records is None else records.get(name)
        if records is not None and (record is None or not record.weights):
            return None
        done = pack_tensor(opened.get(name), record)
        if done is None:
            return None
        if index_name(name) in opened:
            raise UserError(f"{source} has a tensor {index_name(name)}, where the index of {name} would stand.")
        entries[name], packed = done
        return [(name, packed.values), (index_name(name), packed.index)]

    with write_errors(into or directory):
        rewrite(opened, directory, turn)
        copy_others(opened, directory, but=[_CONFIG])
        if entries:
            config["quantization_config"] = packed_config(entries)
        write_json(directory / _CONFIG, config)
        refresh_card(directory, name=(into or directory).name)
        notes = _refresh_page(directory)
    patterns = dict(Counter(entry.pattern for entry in entries.values()))
    return Conversion(into or directory, opened.nbytes, Source(directory).nbytes, len(opened.places), patterns, notes)


def unpack_checkpoint(source: Path, target: Path, *, overwrite: bool = False) -> Conversion:
    """Make the checkpoint in `source` dense again, in `target`.

    Reads what `pack_checkpoint` wrote, and the bitmasks that compressed-tensors wrote up to 0.14.

    Raises
    ------
    UserError
        if `source` is neither, its parts do not fit together (the text names the tensor), or `target` is taken.
    """
    source = Path(source)
    config = read_json(source / _CONFIG)
    opened = Source(source)
    entries = packed_entries(config)
    reader: _Ours | Bitmasks = _Ours(opened, entries) if entries is not None else Bitmasks(opened, config)
    target = check_output(target, overwrite=overwrite, source=source, need_bytes=opened.nbytes + reader.growth)
    with publish(target, overwrite=overwrite) as staging, write_errors(target):
        rewrite(opened, staging, reader.turn)
        copy_others(opened, staging, but=[_CONFIG])
        write_json(staging / _CONFIG, {key: value for key, value in config.items() if key not in reader.config_keys})
        refresh_card(staging, name=target.name)
        notes = _refresh_page(staging)
        after = Source(staging)
        done = Conversion(target, opened.nbytes, after.nbytes, len(after.places), reader.patterns, notes)
    return done


def _refresh_page(directory: Path) -> tuple[str, ...]:
    """Draw the report's page again where it was copied, for it shows the size of the files; returns what went wrong."""
    if not (directory / PAGE).is_file():
        return ()
    from llmprune.report.page import page_trouble  # brings matplotlib

    return tuple(filter(None, [page_trouble(directory)]))


class _Ours:
    """Reads our packed checkpoints."""

    config_keys = ("quantization_config",)

    def __init__(self, source: Source, entries: Mapping[str, Entry]) -> None:
        self.source, self.entries = source, entries
        self.patterns = dict(Counter(entry.pattern for entry in entries.values()))
        self._indexes = {index_name(name) for name in entries}
        for name in (*entries, *sorted(self._indexes)):
            if name not in source:
                raise UserError(f"{source.directory} holds no {name}, and config.json says so: get the files again.")

    @property
    def growth(self) -> int:
        """Bytes that the dense tensors take more."""
        sizes = {name: element_size(self.source.kind(name)[0]) for name in self.entries}
        return sum((entry.elements - entry.kept) * sizes[name] for name, entry in self.entries.items())

    def turn(self, name: str) -> list[tuple[str, Tensor]] | None:
        """A `stream.Turn`."""
        if name in self._indexes:
            return []
        if name not in self.entries:
            return None
        return [(name, self.dense(name))]

    def dense(self, name: str) -> Tensor:
        """The dense tensor of that name, packed or not."""
        if name not in self.entries:
            return self.source.get(name)
        return dense_tensor(name, self.entries[name], self.source.get(name), self.source.get(index_name(name)))


def _check_dense(config: Mapping[str, Any], source: Path) -> None:
    for held in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ORPHAN:
            if held.get(key) is None:
                continue
            method = held[key].get("quant_method", "unknown") if isinstance(held[key], dict) else "unknown"
            if method == METHOD:
                raise UserError(f"{source} is packed already; `llmprune unpack` makes it dense.")
            raise UserError(
                f"{source} is quantized or compressed ({key}: {method}), and only dense weights are packed: give the "
                "checkpoint that it was made from, or unpack it first."
            )


def _prove(source: Source, directory: Path) -> None:
    """Read the packed checkpoint back and compare it with its source, bit for bit."""
    entries = packed_entries(read_json(directory / _CONFIG)) or {}
    packed = _Ours(Source(directory), entries)
    for name in source.places:
        if not _same_bits(source.get(name), packed.dense(name)):
            raise VerificationError(f"{name} did not survive packing; nothing was written. Please report this.")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return all(torch.equal(*pair) for pair in _byte_pieces(one, other))


def _byte_pieces(one: Tensor, other: Tensor, piece: int = 2**24) -> Iterator[tuple[Tensor, Tensor]]:
    views = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    for start in range(0, len(views[0]), piece):
        yield views[0][start : start + piece], views[1][start : start + piece]
