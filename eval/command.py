"""The command lines of this room: `llmprune eval`, and the options that they share.

`python -m llmprune.eval.perplexity` is `llmprune eval`; zero_shot.py and compare.py can be run by hand likewise.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from llmprune.data import BosMode, load_corpus
from llmprune.errors import LlmpruneError, UserError
from llmprune.eval.generation import Generation
from llmprune.eval.losses import LOGITS_MEMORY, memory_named
from llmprune.eval.measure import Measured, Measures, Wanted
from llmprune.eval.perplexity import CHARACTERS_PER_TOKEN, Perplexity, default_seq_len
from llmprune.eval.tasks import TASKS
from llmprune.eval.zero_shot import ZeroShot, check_zero_shot
from llmprune.machine import device_named
from llmprune.model import Loaded, check_model, load
from llmprune.options import ModelNamed
from llmprune.results import recovery

__all__ = [
    "check_early",
    "command",
    "measured_json",
    "model_options",
    "opened",
    "progress",
    "run_command",
    "task_options",
    "text_options",
    "wanted_by",
    "zero_shot_command",
]

Option = Callable[[Any], Any]


def _named_tasks(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(None, ",".join(given).split(",")))


def _memory(_ctx: click.Context, _option: click.Parameter, written: str) -> int:
    return memory_named(written)


MODEL_OPTIONS: tuple[Option, ...] = (
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--device", help="Such as cpu or cuda:1. [default: the GPU if there is one]"),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option(
        "--logits-memory",
        default=f"{LOGITS_MEMORY // 2**20}MiB",
        show_default=True,
        callback=_memory,
        help="Logits held at once at most, which sizes batches.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
)

TEXT_OPTIONS: tuple[Option, ...] = (
    click.option(
        "--dataset",
        "datasets",
        multiple=True,
        default=("wikitext2",),
        show_default=True,
        help="c4, wikitext2, demo, Hub id or file. [may be repeated]",
    ),
    click.option("--no-perplexity", is_flag=True, help="Only the tasks."),
    click.option("--text-column", help="Column with the text. [default: text, else messages]"),
    click.option(
        "--tokens",
        type=int,
        help="Tokens of each text at most, one window at least. [default: all; compare: 16384 on a CPU]",
    ),
    click.option("--seq-len", type=int, help="Tokens per window. [default: 2048, or what the model takes]"),
    click.option(
        "--bos", type=click.Choice(get_args(BosMode)), default="auto", show_default=True, help="BOS per window."
    ),
    click.option("--batch-size", type=int, help="Windows per forward. [default: by memory for logits]"),
)

TASK_OPTIONS: tuple[Option, ...] = (
    click.option(
        "--tasks",
        multiple=True,
        callback=_named_tasks,
        help=f"Zero-shot tasks, by lm-eval: {', '.join(TASKS)}. [commas, or repeated]",
    ),
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        help="Folder with the items of the tasks, as JSON lines. [default: from the Hub]",
    ),
    click.option("--limit", type=int, help="Items of each task at most. [default: all]"),
)


def _applied(options: Sequence[Option]) -> Option:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_options, text_options = _applied(MODEL_OPTIONS), _applied(TEXT_OPTIONS)
task_options = _applied(TASK_OPTIONS)


def opened(name: str, *, device: str | None, **options: Any) -> Loaded:
    """The model, loaded as the command line asks for it, on its device."""
    found = load(name, **options)
    found.model.to(device_named(device))
    return found


def check_early(names: Sequence[str], *, how: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what cannot work before the first model is loaded.

    names : of the models; how : their dtype, device and trust_remote_code; options : what to measure
    """
    device_named(how["device"])
    if options["no_perplexity"] and not options["tasks"]:
        raise UserError("there is nothing to measure: leave out --no-perplexity, or name --tasks.")
    check_zero_shot(options["tasks"], options["data"], options["limit"])
    for name in names:
        check_model(name, dtype=how["dtype"], trust_remote_code=how["trust_remote_code"])


def wanted_by(
    loaded: Loaded, *, datasets: Sequence[str], no_perplexity: bool, text_column: str | None, **options: Any
) -> Wanted:
    """What the options ask for, with the texts read. `options` are fields of `Wanted`."""
    tokens, seq_len = options["tokens"], options["seq_len"] or default_seq_len(loaded.model.config)
    enough = None if tokens is None else CHARACTERS_PER_TOKEN * max(tokens, seq_len)
    corpora = [
        load_corpus(
            dataset,
            purpose="evaluation",
            text_column=text_column,
            tokenizer=loaded.tokenizer,
            enough_characters=enough,
        )
        for dataset in (() if no_perplexity else datasets)
    ]
    return Wanted(corpora, **{**options, "seq_len": seq_len})


@click.command(cls=ModelNamed, help="Perplexity of a model, and how far it is from the dense one; zero-shot tasks.")
@click.option("--model", "model_id", required=True, help="Hub id, folder or GGUF file.")
@click.option("--revision", help="Branch, tag or commit of the model.")
@click.option("--against", metavar="DENSE", help="The dense model, to compare with: hub id, folder or GGUF file.")
@text_options
@task_options
@model_options
def command(*, model_id: str, revision: str | None, against: str | None, as_json: bool, **options: Any) -> None:
    how = {name: options.pop(name) for name in ("dtype", "device", "trust_remote_code")}
    check_early([name for name in (against,) if name is not None], how=how, options=options)
    check_model(model_id, revision=revision, dtype=how["dtype"], trust_remote_code=how["trust_remote_code"])
    first = opened(model_id if against is None else against, revision=revision if against is None else None, **how)
    measures = Measures(wanted_by(first, **options), progress())
    if against is None:
        dense, found = None, measures.alone(first.model, first.tokenizer)
    else:
        dense = measures.dense(first.model, first.tokenizer)
        del first
        loaded = opened(model_id, revision=revision, **how)
        found = measures.against(loaded.model, loaded.tokenizer)
    if as_json:
        click.echo(json.dumps(measured_json(model_id, found, dense), indent=2))
    else:
        click.echo("\n".join(_as_lines(found, dense)))


def measured_json(name: str, found: Measured, dense: Measured | None) -> dict[str, Any]:
    """One model's result as plain data: its rows, and beside the dense model's how much is left of it, in per cent."""
    document: dict[str, Any] = {"model": name, "rows": found.plain_rows(), "notes": found.notes}
    if dense is not None:
        pairs = zip(dense.plain_rows(), found.plain_rows(), strict=True)
        document |= {"recovery": [recovery(*pair) for pair in pairs], "generations": found.plain_generations()}
    return document


def _as_lines(found: Measured, dense: Measured | None) -> list[str]:
    lines: list[str] = []
    for index, row in enumerate(found.rows):
        lines += [*([""] if index else []), *_row_lines(row, None if dense is None else dense.rows[index])]
    for generation in found.generations:
        lines += ["", *_generation_lines(generation)]
    return lines + [f"note: {note}" for note in found.notes]


def _row_lines(row: Perplexity | ZeroShot, dense: Perplexity | ZeroShot | None) -> list[str]:
    if isinstance(row, Perplexity):
        name, counted = "perplexity", f"tokens      {row.tokens:,} predicted in {row.windows:,} windows"
    else:
        name, counted = row.task, f"items       {row.items:,}"
    lines = [f"{name:<11} {row}"]
    if dense is not None:
        left = recovery(vars(dense), vars(row))
        lines[0] += f"   dense {dense}" + ("" if left is None else f"   recovery {left:.1f} %")
    lines.append(f"{counted}, {row.seconds:.1f} s")
    lines.append(_wrapped("protocol", row.protocol))
    if isinstance(row, Perplexity) and row.divergence is not None:
        far = row.divergence
        lines[1:1] = [f"KL          {far.kl_text} nats a token", f"top-1       {far.top1_text} the same"]
        lines.append(_wrapped("", far.protocol))
    return lines


def _wrapped(label: str, text: str) -> str:
    """A text beside its label: on a terminal in lines that end between words, in a file in one."""
    line = f"{label:<12}{text}"
    if not sys.stdout.isatty():
        return line
    return textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=" " * 12)


def _generation_lines(generation: Generation) -> list[str]:
    return [
        _wrapped("prompt", repr(generation.prompt)),
        _wrapped("  dense", repr(generation.dense)),
        _wrapped("  this", repr(generation.pruned)),
    ]


@click.command(
    help="Zero-shot accuracy of a model by the lm-evaluation-harness, on all tasks where --tasks names none."
)
@click.option("--model", "model_id", required=True, help="Hub id, folder or GGUF file.")
@click.option("--revision", help="Branch, tag or commit of the model.")
@task_options
@model_options
def zero_shot_command(
    *,
    model_id: str,
    revision: str | None,
    as_json: bool,
    tasks: tuple[str, ...],
    data: Path | None,
    limit: int | None,
    logits_memory: int,
    **how: Any,
) -> None:
    tasks = tasks or tuple(TASKS)
    check_zero_shot(tasks, data, limit)
    loaded = opened(model_id, revision=revision, **how)
    wanted = Wanted(tasks=tasks, data=data, limit=limit, logits_memory=logits_memory)
    found = Measures(wanted, progress()).alone(loaded.model, loaded.tokenizer)
    if as_json:
        click.echo(json.dumps(measured_json(model_id, found, None), indent=2))
    else:
        click.echo("\n".join(_as_lines(found, None)))


def progress() -> Callable[[int, int], None] | None:
    """A counter on one line of a terminal; nothing where standard error is a file."""
    screen = sys.stderr  # now: while others are kept quiet it is something else
    if not screen.isatty():
        return None
    return lambda done, total: click.echo(f"\rmeasured {done:,} of {total:,}", file=screen, nl=done == total)


def run_command(given: click.Command, argv: Sequence[str] | None, name: str) -> None:
    """Run a command as a program of its own: exit code 2 and one sentence where something given cannot be used."""
    try:
        given.main(args=None if argv is None else list(argv), prog_name=name)
    except LlmpruneError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
