"""`python -m llmprune` is the command line `llmprune`."""

from __future__ import annotations

from llmprune.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
