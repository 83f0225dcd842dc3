"""One-shot pruning of Hugging Face language models.

    from llmprune import prune
    result = prune("HuggingFaceTB/SmolLM2-135M", sparsity="2:4", dataset="wikitext2", output="SmolLM2-135M-2of4")

Importing this package takes milliseconds: torch and transformers load with the first public name that needs them
(PEP 562), so that `llmprune --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmprune.errors import (
    HubError,
    LlmpruneError,
    NumericError,
    UnsupportedModel,
    UserError,
    VerificationError,
    WalkError,
)
from llmprune.runtime.import_hook import when_imported

if TYPE_CHECKING:
    from llmprune.checkpoint.verify import verify
    from llmprune.config import EvaluationConfig, PruneConfig
    from llmprune.job import PruneResult, prune

__version__ = "0.1.0"

__all__ = [
    "EvaluationConfig",
    "HubError",
    "LlmpruneError",
    "NumericError",
    "PruneConfig",
    "PruneResult",
    "UnsupportedModel",
    "UserError",
    "VerificationError",
    "WalkError",
    "__version__",
    "prune",
    "verify",
]

# Public names that cost a heavy import, and the module that each lives in.
_HOMES = {
    "EvaluationConfig": "llmprune.config",
    "PruneConfig": "llmprune.config",
    "PruneResult": "llmprune.job.request",
    "prune": "llmprune.job",
    "verify": "llmprune.checkpoint.verify",
}


def __getattr__(name: str) -> Any:
    """Load a public name at its first use, and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def _register_with_transformers() -> None:
    from llmprune.runtime.transformers_plugin import register

    register()


# Packed checkpoints load through transformers as soon as both packages are imported, in whichever order.
when_imported("transformers.quantizers.auto", _register_with_transformers)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
