"""Options of the command line: under headings in the help text, and what to do about a model without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

__all__ = ["ModelNamed", "Titled", "cured", "grouped", "model_misplaced"]

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


def model_misplaced(name: str) -> str:
    """What to do about a model that stands where a verb or nothing should; empty if it is no model."""
    looks = name == "demo" or name.endswith(".gguf") or "/" in name or Path(name).exists()
    return f"A model is given as --model {name}" if looks else ""


def cured(error: click.UsageError, cure: str) -> click.UsageError:
    """The error with one more sentence, if there is one to say."""
    return click.UsageError(f"{error.format_message().rstrip('.')}. {cure}", error.ctx) if cure else error
