"""Models: loading them from anywhere transformers can, and finding what can be pruned.

load.py        a model by hub id, directory, GGUF file or `demo`, dequantized, on the CPU
structure.py   decoder layers and their matrices, found by structure
size.py        how large a model's files are
shelf.py       weights that rest on disk while it is not their turn
read_ahead.py  those whose turn is next, read from the disk meanwhile
"""

from __future__ import annotations

from llmprune.model.load import DTYPES, Loaded, check_model, load, located, quiet_transformers
from llmprune.model.shelf import Shelf, shelf_of
from llmprune.model.size import stored_bytes
from llmprune.model.structure import Decoder, find_decoder, max_seq_len

__all__ = [
    "DTYPES",
    "Decoder",
    "Loaded",
    "Shelf",
    "check_model",
    "find_decoder",
    "load",
    "located",
    "max_seq_len",
    "quiet_transformers",
    "shelf_of",
    "stored_bytes",
]
