"""Text: where it comes from, and how it becomes windows of tokens. Knows nothing of models or pruning.

corpus.py    a name, path or Python object to a `Corpus`: texts with a record of their origin
tables.py    rows of files and data sets, and which column is the text
hub.py       data sets of the Hugging Face Hub, and its errors in one sentence
windows.py   texts to windows of token ids, seeded
"""

from __future__ import annotations

from llmprune.data.corpus import Corpus, Purpose, Source, load_corpus
from llmprune.data.windows import BosMode, bos_token, calibration_windows, evaluation_windows

__all__ = [
    "BosMode",
    "Corpus",
    "Purpose",
    "Source",
    "bos_token",
    "calibration_windows",
    "evaluation_windows",
    "load_corpus",
]
