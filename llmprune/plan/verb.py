"""`llmprune plan`, the command: the options of a run, those that decide what it does and what it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import click

from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.config_file import evaluation_options, typed_first
from llmprune.machine import keep_memory_together
from llmprune.options import ModelNamed, Titled
from llmprune.plan.overview import Request, forecast
from llmprune.plan.show import show_forecast

__all__ = ["command"]

HELP = """What a run with these options would do, before it does anything: which weights it prunes and which not and
why, zeros and bytes before and after, peak memory, time on this machine, and whether the result will be smaller or
faster.

Reads the model's configuration and the headers of its files, never a weight; of a model on the Hub, a few kilobytes.
"""

TAKEN = {f.name for kind in (PruneConfig, EvaluationConfig, Request) for f in fields(kind)}
"""Names of the options of a run that a plan knows what to do with."""


def command(options: Sequence[click.Parameter]) -> click.Command:
    """The command, made from those of a run."""
    also = {"no_eval", "config_file"}
    taken = [option for option in options if option.name in TAKEN | also]
    every = click.Option(["--all", "every"], is_flag=True, help="A line for every weight, equal ones not folded.")
    as_json = click.Option(["--json", "as_json"], is_flag=True, help="Print everything as JSON on standard output.")
    return _Plan("plan", params=[*taken, every, as_json], callback=_plan, help=HELP)


class _Plan(ModelNamed, Titled):
    """Its options under headings, and its model behind one of them."""


def _plan(*, every: bool, as_json: bool, **options: Any) -> None:
    keep_memory_together()
    if options["model"] is None:
        raise click.UsageError("--model is missing: a hub id (gpt2), a directory, a .gguf file, or demo.")
    typed_first(options)
    evaluation = evaluation_options(options)
    config = {f.name: options.pop(f.name) for f in fields(PruneConfig) if f.name in options}
    plan = forecast(Request(config=PruneConfig(**config), evaluation=EvaluationConfig(**evaluation), **options))
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=2, default=str))
    else:
        show_forecast(plan, every=every)
