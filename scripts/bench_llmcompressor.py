"""One measurement of llm-compressor in a process of its own; `bench_prune` starts it: `python … JOB.json`.

The job is that of bench_llmprune.py. Runs in an environment that has llmcompressor and knows nothing of llmprune. Its
`mask_structure` counts the weights of a group that are pruned, where `sparsity` counts those that are kept.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from measured import Measured
from safetensors.torch import load_file, save_file


def main(job_file: str) -> None:
    """Load, prune, write what it cost."""
    from llmcompressor import oneshot

    job = json.loads(Path(job_file).read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    dataset = dataset_of(load_file(job["windows"])["input_ids"])
    recipe = recipe_for(job["method"], job["sparsity"])
    with Measured() as cost:
        oneshot(
            model=model,
            tokenizer=job["model"],
            recipe=recipe,
            dataset=dataset,
            num_calibration_samples=len(dataset),
            max_seq_length=len(dataset[0]["input_ids"]),
            shuffle_calibration_samples=False,
        )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tool": importlib.metadata.version("llmcompressor"),
    }
    result = {**cost.numbers(), "versions": versions, "threads": torch.get_num_threads()}
    Path(job["result"]).write_text(json.dumps(result))
    if job["save"]:
        save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, job["save"])


def dataset_of(windows: torch.Tensor) -> Any:
    """A `datasets.Dataset` of already tokenised windows (num_samples, seq_len), nothing in them masked."""
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})


def recipe_for(method: str, sparsity: str) -> Any:
    """The modifier that does what `method` at `sparsity` ("2:4" or a fraction) means to llmprune."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    return kind(**amount_of(sparsity), ignore=["re:.*lm_head"])


def amount_of(sparsity: str) -> dict[str, Any]:
    """`sparsity` and `mask_structure` for llm-compressor: "1:4", one kept of four, is its "3:4"."""
    if ":" not in sparsity:
        return {"sparsity": float(sparsity)}
    kept, group = (int(part) for part in sparsity.split(":"))
    return {"sparsity": 1 - kept / group, "mask_structure": f"{group - kept}:{group}"}


if __name__ == "__main__":
    main(sys.argv[1])
