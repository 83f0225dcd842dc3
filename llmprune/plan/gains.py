"""Will it be smaller or faster, and where? One honest line for each program that people run models with.

The sentences follow what was measured or is documented of the versions named; our own numbers are those of
docs/results/cpu.md.
"""

from __future__ import annotations

import torch

from llmprune.sparsity.pattern import NM, Pattern, Unstructured

__all__ = ["gains"]

LEAST_MEASURED = 0.5
"""The lowest sparsity at which packed products were measured."""


def gains(pattern: Pattern, dtype: torch.dtype, *, packed_share: float) -> dict[str, str]:
    """Program → what a model pruned like this gains in it.

    Parameters
    ----------
    dtype : of the weights
    packed_share : bytes of the packed files, as a share of the dense ones
    """
    two_of_four = pattern == NM(2, 4)
    return {
        "transformers": f"Dense files: as large and as fast as before. {_torch(two_of_four=two_of_four)}",
        "vLLM": f"Dense files: as large and as fast as before{_vllm(two_of_four=two_of_four)}. Packed files: not read.",
        "llama.cpp": "Dense files, converted: as large and as fast as before, GGUF stores zeros like any number. "
        "Packed files: not read.",
        "llmprune": _ours(pattern, dtype, packed_share),
    }


def _torch(*, two_of_four: bool) -> str:
    if two_of_four:
        return (
            "On NVIDIA GPUs since Ampere, torch.sparse.to_sparse_semi_structured after loading can be faster for large "
            "batches, and is often slower for single tokens."
        )
    return "torch has no product that gains from this pattern."


def _vllm(*, two_of_four: bool) -> str:
    return ": its 2:4 kernels were removed in 0.19" if two_of_four else ", it has no kernels for this pattern"


def _ours(pattern: Pattern, dtype: torch.dtype, packed_share: float) -> str:
    if packed_share >= 1:
        return "Packed files would be no smaller: too few zeros."
    readers = "read by transformers after `import llmprune` and by `llmprune generate`"
    return f"Packed files: {packed_share:.0%} of the dense ones, {readers}. {_measured(pattern, dtype)}"


def _measured(pattern: Pattern, dtype: torch.dtype) -> str:
    half = dtype in (torch.bfloat16, torch.float16)
    known = pattern == NM(2, 4) or (isinstance(pattern, Unstructured) and pattern.sparsity >= LEAST_MEASURED)
    if not known:
        return "Speed at this pattern was not measured: see `llmprune bench`."
    if pattern == NM(2, 4) and half:
        return "On a CPU with bf16 instructions text came 1.7 to 1.8 times as fast, prompts were read 3 to 6 % slower."
    low, high = ("2.5", "3.6") if half else ("1.1", "2.6")
    return f"On a CPU products with one token were {low} to {high} times as fast; prompts gain nothing."
