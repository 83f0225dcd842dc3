"""The content-addressed store of Xet, the way by which large files go up unless it is switched off.

A client cuts files into chunks, packs chunks into xorbs, and describes in a shard of which chunks each file is made.
Formats, from the public specification (huggingface.co/docs/xet: xorb, shard, api):

    xorb   chunks, each   version (1) = 0 | packed size (3) | scheme (1) | raw size (3) | data
    shard  48 bytes of header; per file  hash (32) flags (4) terms (4) pad (8);
           per term  xorb (32) flags (4) raw size (4) first chunk (4) end chunk (4);
           48 bytes a term if flag 31 is set; sha256 (32) pad (16) if flag 30 is; the list ends with 32 bytes of 0xFF

All numbers are little-endian. A hash is written as four 64-bit words, sixteen hex digits each.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

__all__ = ["Cas", "Term", "UnknownXorb"]

_HEADER = 48
_ROW = 48
_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


class UnknownXorb(Exception):
    """A shard speaks of a xorb that was never uploaded."""


@dataclass(frozen=True)
class Term:
    """A piece of a file: chunks [start, end) of a xorb, which unpack to `length` bytes."""

    xorb: str
    length: int
    start: int
    end: int


class Cas:
    """Xorbs as they came, and the files that shards made of them."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.by_sha256: dict[str, str] = {}

    def add_shard(self, data: bytes) -> None:
        """Register the files that a shard describes, with the sha256 by which git knows them.

        Raises
        ------
        UnknownXorb
            if a file needs chunks that are not here.
        """
        at = _HEADER
        while data[at : at + 32] != _END:
            file = _hash_text(data[at : at + 32])
            flags, count = struct.unpack_from("<II", data, at + 32)
            at += _ROW
            terms = [self._term(data, at + _ROW * index) for index in range(count)]
            at += _ROW * count * (2 if flags & _HAS_VERIFICATION else 1)
            self.files[file] = terms
            if flags & _HAS_SHA256:
                self.by_sha256[_hash_text(data[at : at + 32])] = file
                at += _ROW

    def _term(self, data: bytes, at: int) -> Term:
        xorb = _hash_text(data[at : at + 32])
        if xorb not in self.xorbs:
            raise UnknownXorb(xorb)
        _, length, start, end = struct.unpack_from("<IIII", data, at + 32)
        return Term(xorb, length, start, end)

    def content(self, file: str) -> bytes:
        """The bytes of a file, for a client that asks for it by plain HTTP."""
        return b"".join(_unpacked(self.xorbs[term.xorb], term) for term in self.files[file])

    def reconstruction(self, file: str, span: tuple[int, int], data_url: str) -> dict[str, Any] | None:
        """How to put a file's bytes, first to last (`span`), together; None where they lie behind its end.

        Raises
        ------
        KeyError
            if there is no such file.
        """
        terms, skip = _within(self.files[file], span)
        if not terms:
            return None
        fetch: dict[str, list[dict[str, Any]]] = {}
        for term in terms:
            places = _chunks(self.xorbs[term.xorb])
            span_in_xorb = {"start": places[term.start][0], "end": places[term.end - 1][1] - 1}
            row = {"range": _range(term), "url": f"{data_url}/{term.xorb}", "url_range": span_in_xorb}
            fetch.setdefault(term.xorb, []).append(row)
        rows = [{"hash": term.xorb, "unpacked_length": term.length, "range": _range(term)} for term in terms]
        return {"offset_into_first_range": skip, "terms": rows, "fetch_info": fetch}


def _hash_text(raw: bytes) -> str:
    """A hash of 32 bytes as Xet writes it."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _within(terms: list[Term], span: tuple[int, int]) -> tuple[list[Term], int]:
    """The terms that hold the bytes of `span`, and how many bytes of the first lie before it."""
    kept: list[Term] = []
    skip, at = 0, 0
    for term in terms:
        if at + term.length > span[0] and at <= span[1]:
            skip = skip if kept else span[0] - at
            kept.append(term)
        at += term.length
    return kept, skip


def _range(term: Term) -> dict[str, int]:
    return {"start": term.start, "end": term.end}


def _unpacked(xorb: bytes, term: Term) -> bytes:
    """The chunks of a term. Schemes: 0 as they are, 1 an LZ4 frame, 2 likewise, bytes grouped by place modulo 4."""
    raw = []
    for start, end in _chunks(xorb)[term.start : term.end]:
        scheme, size = xorb[start + 4], int.from_bytes(xorb[start + 5 : start + 8], "little")
        data = xorb[start + 8 : end]
        if scheme:
            data = pa.decompress(data, decompressed_size=size, codec="lz4", asbytes=True)
        raw.append(_ungrouped(data) if scheme == 2 else data)
    return b"".join(raw)


def _ungrouped(data: bytes) -> bytes:
    """Bytes at places 0, 4, 8, … come first in `data`, then those at 1, 5, 9, …"""
    whole, at = bytearray(len(data)), 0
    for place in range(4):
        count = len(whole[place::4])
        whole[place::4] = data[at : at + count]
        at += count
    return bytes(whole)


def _chunks(xorb: bytes) -> list[tuple[int, int]]:
    """(start, end) in bytes of every chunk, its header included. What follows the last one is an index of its own."""
    places, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed, raw = int.from_bytes(xorb[at + 1 : at + 4], "little"), int.from_bytes(xorb[at + 5 : at + 8], "little")
        end = at + 8 + packed
        if raw == 0 or end > len(xorb):
            break
        places.append((at, end))
        at = end
    return places
