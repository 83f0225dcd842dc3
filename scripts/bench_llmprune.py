"""One measurement of llmprune in a process of its own; `bench_prune` starts it: `python bench_llmprune.py JOB.json`.

The job names `model` (a directory), `windows` (a .safetensors file), `method` (or an effort), `sparsity`, `result` (a
JSON file to write) and `save` (a .safetensors file for the pruned parameters, or null). Only the pruning call is
measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from measured import Measured
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.config import EFFORTS, PruneConfig
from llmprune.machine import keep_memory_together
from llmprune.model import load
from llmprune.pipeline import prune_layers


def main(job_file: str) -> None:
    """Load, prune, write what it cost."""
    keep_memory_together()  # as the command line does
    job = json.loads(Path(job_file).read_text())
    model = load(job["model"]).model
    windows = load_file(job["windows"])["input_ids"]
    kind = "effort" if job["method"] in EFFORTS else "method"
    config = PruneConfig(**{kind: job["method"]}, sparsity=job["sparsity"], seq_len=windows.shape[1])
    with Measured() as cost:
        prune_layers(model, windows, config, device=torch.device("cpu"))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "tool": llmprune.__version__}
    result = {**cost.numbers(), "versions": versions, "threads": torch.get_num_threads()}
    Path(job["result"]).write_text(json.dumps(result))
    if job["save"]:
        save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, job["save"])


if __name__ == "__main__":
    main(sys.argv[1])
