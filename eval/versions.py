"""Which programs a number was made with."""

from __future__ import annotations

from importlib.metadata import version

from llmprune import __version__

__all__ = ["versions"]


def versions(*packages: str) -> dict[str, str]:
    """Versions of llmprune, torch and transformers, and of the further `packages` by their names on PyPI."""
    return {"llmprune": __version__, **{name: version(name) for name in ("torch", "transformers", *packages)}}
