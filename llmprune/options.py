"""Options of the command line: under headings in the help text, and from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.core import ParameterSource

__all__ = [
    "ModelNamed",
    "Titled",
    "cured",
    "evaluation_options",
    "grouped",
    "model_misplaced",
    "read_config",
    "typed_first",
]

F = TypeVar("F", bound=Callable[..., Any])


class _Option(Protocol):
    def __call__(self, *names: str, **settings: Any) -> Callable[[F], F]: ...


def grouped(title: str) -> _Option:
    """Options that stand together in the help text."""

    def option(*names: str, **settings: Any) -> Callable[[F], F]:
        return click.option(*names, cls=_TitledOption, title=title, **settings)

    return option


class _TitledOption(click.Option):
    def __init__(self, *args: Any, title: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.title = title


class Titled(click.Command):
    """A command whose options stand under the headings that they were given."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, heading by heading, and the verbs of a group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (row := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "title", "Other"), []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


class ModelNamed(click.Command):
    """A command that takes a model as --model, and says so where one was given without."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with the cure for a model among the arguments that are left."""
        alone = [arg for before, arg in zip(["", *args], args, strict=False) if "-" not in (before[:1], arg[:1])]
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if type(error) in (click.UsageError, click.MissingParameter):
                raise cured(error, next(filter(None, map(model_misplaced, alone)), "")) from None
            raise


def typed_first(options: dict[str, Any]) -> None:
    """A method that was typed goes before an effort that stands in a file, which would choose a method itself."""
    source = click.get_current_context().get_parameter_source
    if source("method") is ParameterSource.COMMANDLINE and source("effort") is ParameterSource.DEFAULT_MAP:
        options["effort"] = None


def _parse(path: Path) -> Any:
    """JSON, or YAML with every value left as text: YAML 1.1 would read 2:4 as a number in base 60, 124."""
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = (
            "" if mark is None else f" (line {mark.line + 1}: {getattr(error, 'problem', None) or 'cannot be read'})"
        )
        raise click.BadParameter(
            f"{path} is neither JSON nor YAML{where}; it should read like  sparsity: 2:4"
        ) from None


def read_config(ctx: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Settings from a file become the defaults of this command; what is typed goes before them."""
    if path is None:
        return None
    settings = _parse(path)
    if isinstance(settings, dict) and "llmprune_config" in settings:
        from llmprune.config import asked_for

        settings = asked_for(settings["llmprune_config"])  # the config.json of a pruned model: do the same again
    if not isinstance(settings, dict):
        raise click.BadParameter(f"{path} holds no settings; it should read like  sparsity: 2:4")
    settings.pop("llmprune_version", None)
    known = _by_name(ctx.command)
    defaults: dict[str, Any] = {}
    for written, value in settings.items():
        if (option := known.get(name := str(written).replace("-", "_"))) is None:
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise click.BadParameter(
                f"{path} sets {written}, which is no option; {meant}Options: {', '.join(sorted(known))}."
            )
        if value not in (None, "", "null", "~"):
            defaults[str(option.name)] = _several(value) if option.multiple else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _by_name(command: click.Command) -> dict[str, click.Option]:
    """The options that a file may set, under the names that are typed after `--`."""
    options = [each for each in command.params if isinstance(each, click.Option) and each.name != "config_file"]
    return {name.lstrip("-").replace("-", "_"): each for each in options for name in each.opts if name.startswith("--")}


def _several(value: Any) -> list[Any]:
    """A list as it is; a single value is a list of one, and `down_proj: 4:8` is down_proj=4:8."""
    if isinstance(value, dict):
        return [f"{key}={one}" for key, one in value.items()]
    return value if isinstance(value, list) else [value]


def evaluation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that say what is measured, taken out of `options`; with --no-eval, nothing is."""
    from llmprune.config import EvaluationConfig

    taken = {each.name: options.pop(each.name) for each in fields(EvaluationConfig) if each.name in options}
    return taken | {"eval_dataset": (), "eval_tasks": ()} if options.pop("no_eval") else taken


def model_misplaced(name: str) -> str:
    """What to do about a model that stands where a verb or nothing should; empty if it is no model."""
    looks = name == "demo" or name.endswith(".gguf") or "/" in name or Path(name).exists()
    return f"A model is given as --model {name}" if looks else ""


def cured(error: click.UsageError, cure: str) -> click.UsageError:
    """The error with one more sentence, if there is one to say."""
    return click.UsageError(f"{error.format_message().rstrip('.')}. {cure}", error.ctx) if cure else error
