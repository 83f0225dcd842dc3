"""Weights that are wanted next, read from the disk while the processor is busy with others.

A thread reads their bytes and forgets them: the system keeps them in its page cache, where whoever maps the file finds
them. The process itself holds one small buffer, and the system may take the pages back whenever it needs them. Asking
for it by posix_fadvise is not enough: Linux then reads no more at a time than the disk's read-ahead window.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path

__all__ = ["read_ahead", "spans"]

BUFFER = 2**20


def read_ahead(wanted: Iterable[tuple[str, str]]) -> threading.Thread:
    """Begin to read these tensors, given as (safetensors file, name there), and return at once.

    What cannot be read is passed over: whoever wants it will find out.
    """
    thread = threading.Thread(target=_read, args=(sorted(wanted),), daemon=True, name="read ahead")
    thread.start()
    return thread


def spans(file: str, names: Iterable[str]) -> list[tuple[int, int]]:
    """Where the bytes of these tensors begin and end in a safetensors file, neighbours in one.

    Raises
    ------
    OSError, ValueError, KeyError
        if it is no such file, or does not hold them.
    """
    with Path(file).open("rb") as opened:  # eight bytes with the length of the header, the header, the data
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    found: list[tuple[int, int]] = []
    for begin, end in sorted(header[name]["data_offsets"] for name in names):
        begin, end = (8 + length + offset for offset in (begin, end))
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


def _read(wanted: list[tuple[str, str]]) -> None:
    buffer = memoryview(bytearray(BUFFER))
    for file, places in groupby(wanted, key=lambda place: place[0]):
        with suppress(OSError, ValueError, KeyError):
            _read_spans(file, spans(file, [name for _, name in places]), buffer)


def _read_spans(file: str, places: list[tuple[int, int]], buffer: memoryview) -> None:
    with Path(file).open("rb", buffering=0) as opened:
        for begin, end in places:
            opened.seek(begin)
            while begin < end and (count := opened.readinto(buffer[: end - begin])):
                begin += count
