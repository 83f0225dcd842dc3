"""Options of the command line: under headings in the help text, and from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.core import ParameterSource

__all__ = ["Titled", "grouped", "read_config", "typed_first"]

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
        raise click.BadParameter(f"{path} is neither JSON nor YAML: {str(error).splitlines()[0]}") from None


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
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    known = {parameter.name for parameter in ctx.command.params} - {"config_file"}
    if unknown := sorted(settings.keys() - known):
        raise click.BadParameter(
            f"{path} sets {', '.join(unknown)}, which is no option. Options: {', '.join(sorted(filter(None, known)))}."
        )
    ctx.default_map = {
        **(ctx.default_map or {}),
        **{k: v for k, v in settings.items() if v not in (None, "", "null", "~")},
    }
    return path
