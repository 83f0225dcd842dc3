"""Hidden states in files in place of memory: 128 windows of 2048 tokens are gigabytes, twice where the dense path runs
beside the pruned one.

Each tensor gets a file of its own, which is mapped and at once unlinked: the system keeps as much of it in memory as
there is room for, and its space on disk is free as soon as the tensor is gone, however the process ends.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["mapped"]


def mapped(tensor: Tensor, directory: Path) -> Tensor:
    """The same numbers in a mapped file in `directory`, on the CPU.

    Raises
    ------
    OSError
        if the file cannot be written (disk full).
    """
    flat = tensor.detach().cpu().contiguous().view(-1)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="hidden-states-") as file:
        file.write(flat.view(torch.uint8).numpy().data)  # written, not mapped and filled: a full disk is an error here
        file.flush()
        held = torch.from_file(file.name, shared=True, size=flat.numel(), dtype=flat.dtype)
    return held.view(tensor.shape)
