"""The zero-shot tasks by name, and where their items lie.

A task here is a task file of the lm-evaluation-harness with two changes, written as a task file that includes it: only
the metric that is reported is computed, and items may come from a folder of JSON lines in place of the Hub.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import UserError

__all__ = ["TASKS", "Items", "Task", "check_tasks", "task_files"]


@dataclass(frozen=True)
class Task:
    """A task of the harness: its name there, its file below `lm_eval/tasks`, and the metric that people report."""

    name: str
    file: str
    metric: str


TASKS = {
    "lambada": Task("lambada_openai", "lambada/lambada_openai.yaml", "acc"),
    "piqa": Task("piqa", "piqa/piqa.yaml", "acc"),
    "hellaswag": Task("hellaswag", "hellaswag/hellaswag.yaml", "acc_norm"),
    "arc_easy": Task("arc_easy", "arc/arc_easy.yaml", "acc"),
    "arc_challenge": Task("arc_challenge", "arc/arc_challenge.yaml", "acc_norm"),
    "winogrande": Task("winogrande", "winogrande/default.yaml", "acc"),
    "openbookqa": Task("openbookqa", "openbookqa/openbookqa.yaml", "acc_norm"),
}

PLAIN_ROWS = {"query", "choices", "gold"}
"""Columns of items that are written out: the text before the answer, the answers, and the index of the right one."""

_PLAIN = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "process_docs": None}


@dataclass(frozen=True)
class Items:
    """Where the items of a task come from: `config` is the harness's task file, `file` a local file of items.

    `provenance` is empty for items of the Hub: which they are is known when they have been read.
    """

    config: Path
    file: Path | None
    provenance: dict[str, Any]


def check_tasks(tasks: Sequence[str], data: Path | None) -> None:
    """Raises UserError if a task is not known, named twice, or has no file in `data`."""
    for task in tasks:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"a zero-shot task is one of {', '.join(TASKS)}; got {task!r}{hint}.")
        if tasks.count(task) > 1:
            raise UserError(f"the zero-shot task {task} is named twice.")
        if data is not None:
            _columns(_local_file(task, data))


def task_files(tasks: Sequence[str], data: Path | None, folder: Path) -> Iterator[tuple[str, Items]]:
    """Write the harness's task file of each task into `folder`.

    Raises
    ------
    UserError
        as `check_tasks`, or if this version of the harness keeps a task elsewhere.
    """
    for task in tasks:
        file = None if data is None else _local_file(task, data)
        config = _task_file(task, file)
        path = folder / f"{task}.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        provenance = {} if file is None else {"file": file.name, "sha256": _digest(file)}
        yield task, Items(path, file, provenance)


def _task_file(task: str, file: Path | None) -> dict[str, Any]:
    wanted = TASKS[task]
    metric = {"metric": wanted.metric, "aggregation": "mean", "higher_is_better": True}
    config: dict[str, Any] = {"include": str(_original(wanted)), "task": wanted.name, "metric_list": [metric]}
    config["num_fewshot"] = 0
    if file is None:
        return config
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(file)}}}
    config |= {"training_split": None, "validation_split": None, "test_split": "test"}
    return config | _PLAIN if _columns(file) >= PLAIN_ROWS else config


def _original(task: Task) -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations))) / "tasks" / task.file
    if not path.is_file():
        raise UserError(
            f"the installed lm-eval has no task {task.name}: it needs 0.4.13, pip install 'llmprune[eval]'."
        )
    return path


def _local_file(task: str, data: Path) -> Path:
    """The one file in `data` that begins with the task's name: arc_easy.jsonl, ARC-Easy_test.jsonl, …"""
    wanted = task.replace("_", "")
    if not data.is_dir():
        raise UserError(f"the folder of items for zero-shot tasks, {data}, does not exist.")
    files = [
        path
        for path in sorted(data.glob("*.jsonl"))
        if path.stem.lower().replace("_", "").replace("-", "").startswith(wanted)
    ]
    if len(files) != 1:
        found = "none" if not files else ", ".join(path.name for path in files)
        raise UserError(f"{data} should hold one file {task}*.jsonl with the items of {task}; it holds {found}.")
    return files[0].resolve()


def _columns(file: Path) -> set[str]:
    """The columns of the first item."""
    try:
        with file.open(encoding="utf-8") as lines:
            return set(dict(json.loads(next(lines, ""))))
    except (ValueError, TypeError):  # not UTF-8, not JSON, not an object
        raise UserError(f"{file} should hold one JSON object on every line; its first line is none.") from None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
