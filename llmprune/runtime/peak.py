"""The most memory that a process takes for a model, dense or packed; `llmprune bench` starts one for each.

    python -m llmprune.runtime.peak '{"wanted": {"name": "DIR"}, "form": "sparse", "new_tokens": 8}'

prints {"cpu": bytes} and, of a GPU, the most that torch held there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from llmprune.machine import peak_memory
from llmprune.runtime.generate import Clock, generate, prompt_tokens
from llmprune.runtime.opening import Wanted, open_model
from llmprune.runtime.sparsify import densify

__all__ = ["main", "peak"]

PROMPT_TOKENS = 32


def peak(wanted: dict[str, Any], form: str, new_tokens: int) -> dict[str, int]:
    """Load a packed model, make it dense if `form` is "dense", generate, and tell."""
    opened = open_model(Wanted(**wanted))
    if form == "dense":
        densify(opened.model)
    length = prompt_tokens(opened, PROMPT_TOKENS, new_tokens=new_tokens)
    ids = torch.ones(1, length, dtype=torch.int64, device=opened.device)
    generate(opened, ids, Clock(), new_tokens=new_tokens, to_the_end=True)
    return peak_memory(opened.device)


def main() -> None:
    """One task as JSON on the command line, its answer as JSON on standard output."""
    sys.stdout.write(json.dumps(peak(**json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
