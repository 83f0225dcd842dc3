"""A kernel's settings as one word, such as "mma:warps=16,row_tiles=1,unroll=4".

So a timing cache, an operation's arguments and a table of results can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import ClassVar, TypeVar

__all__ = ["Words", "parse"]


class Words:
    """A dataclass of whole numbers that is written as its kernel's name and all its settings."""

    kernel: ClassVar[str]

    def __str__(self) -> str:
        settings = ",".join(f"{name}={value:d}" for name, value in asdict(self).items())  # type: ignore[call-overload]
        return f"{self.kernel}:{settings}"


C = TypeVar("C", bound=Words)


def parse(text: str, kernels: Mapping[str, type[C]]) -> C:
    """The settings from their word; those that it does not name have their defaults.

    kernels : by name, what the word may begin with

    Raises
    ------
    ValueError : if no kernel or no setting has that name, or a value is no whole number
    """
    name, _, settings = text.partition(":")
    if name not in kernels:
        raise ValueError(f"a config begins with {' or '.join(kernels)}; got {text!r}")
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    try:
        return kernels[name](**{key: int(value) for key, _, value in pairs})
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in fields(kernels[name]))  # type: ignore[arg-type] # dataclasses all
        raise ValueError(f"the settings of {name} are whole numbers, named {known}; got {text!r}") from error
