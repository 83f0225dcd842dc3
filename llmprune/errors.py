"""The exceptions that llmprune raises on purpose.

    LlmpruneError
    ├── UserError            something you gave cannot be used: what, what is allowed, what it got, the cure
    │   └── UnsupportedModel the model's structure cannot be pruned honestly, so nothing was done
    ├── NumericError         the numbers themselves went wrong (NaN, inf, a Hessian beyond repair)
    ├── VerificationError    a saved checkpoint is not what its report says
    ├── HubError             the Hub refused or broke off; what was saved is still there
    ├── LostProcess          another process of the same run is gone, so this one cannot go on
    └── WalkError            an internal promise of the layer walk was broken: please report it

The command line turns a `LlmpruneError` into one sentence on standard error and exit code 2. Anything else is a bug
and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "HubError",
    "LlmpruneError",
    "LostProcess",
    "NumericError",
    "UnsupportedModel",
    "UserError",
    "VerificationError",
    "WalkError",
]


class LlmpruneError(Exception):
    """Root of every error that llmprune raises on purpose. Its text is one sentence or more, fit for a person."""


class UserError(LlmpruneError, ValueError):
    """An argument, file or data set cannot be used. The text says what, what is allowed, what it got and the cure."""


class UnsupportedModel(UserError):
    """The model cannot be pruned honestly: nothing matches, too much is out of reach, or it cannot be replayed."""


class NumericError(LlmpruneError, ArithmeticError):
    """NaN or inf in activations, or a Hessian that no damping makes positive definite. The text names the weight."""


class VerificationError(LlmpruneError):
    """A checkpoint on disk does not hold what its report promises. The text names the first few tensors at fault."""


class HubError(LlmpruneError):
    """A push was refused or broke off. The text says where the saved model is and which command to run again.

    result : what `llmprune.prune` would have returned, if the job had come so far
    """

    result: Any = None


class LostProcess(LlmpruneError):
    """Another process of the same run was killed, or its machine cannot be reached any more."""

    def __init__(self, text: str = "") -> None:
        super().__init__(
            text or "Another process of this run is gone (killed, or out of memory?), so all have stopped."
        )


class WalkError(LlmpruneError, RuntimeError):
    """The layer walk met something that its schedule forbids. Nothing was lost silently; the run stops."""
