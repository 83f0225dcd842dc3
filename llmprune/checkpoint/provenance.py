"""Where a checkpoint comes from: versions, machine, model, moment and command, without anybody's secrets."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import llmprune
from llmprune.model.structure import find_decoder

__all__ = ["cleaned", "command_line", "describe_model", "now", "tool_versions"]


def tool_versions(device: torch.device) -> dict[str, str]:
    """What ran, and on what."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "llmprune": llmprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device} ({gpu})" if gpu else str(device),
        "cpu": _cpu_model(),
    }


def describe_model(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What a reader wants to know of the model: "name", "architecture", "type" and the number of its "layers"."""
    layers = len(find_decoder(model).layers)
    return {"name": name, "architecture": type(model).__name__, "type": model.config.model_type, "layers": layers}


def now() -> str:
    """This moment, as in 2026-01-31T12:00:00Z."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that was typed: program name and arguments, a token's value left out."""
    given = list(sys.argv if arguments is None else arguments)
    words = [Path(given[0]).name]
    for before, word in pairwise(given):
        words.append("***" if before == "--token" else re.sub(r"^--token=.*", "--token=***", word))
    return shlex.join(words)


def cleaned(value: Any) -> Any:
    """`value` with tokens and the home directory taken out of every string in it."""
    if isinstance(value, dict):
        return {key: cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(inner) for inner in value]
    if isinstance(value, str | Path):
        text = re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", str(value))
        home = str(Path.home())
        return text if home == "/" else re.sub(rf"{re.escape(home)}(?=$|[/\\\s'\"])", "~", text)
    return value


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", facts.read_text(), re.MULTILINE) if facts.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()
