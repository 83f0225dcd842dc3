"""How a kernel is launched, for tests that compile it without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

__all__ = ["SLACK", "constants"]

SLACK = 1.1
"""So many times the recorded count of instructions is still no regression."""


def constants(kernel: Any, config: Any, **others: object) -> dict[str, object]:
    """The constants of a launch: the config's settings under their names in capitals, as far as the kernel has them,
    a bias, NVIDIA's instructions, and `others`."""
    settings: dict[str, object] = {name.upper(): value for name, value in asdict(config).items()}
    settings |= {"HAS_BIAS": True, "PTX": True}
    return {name: value for name, value in settings.items() if name in kernel.arg_names} | others
