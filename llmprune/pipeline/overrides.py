"""Patterns for single weights: which entry of the settings speaks of which weight."""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.errors import UserError
from llmprune.model.structure import is_ignored
from llmprune.sparsity.allocation import parse_level
from llmprune.sparsity.pattern import Pattern

__all__ = ["overridden", "speaks_of"]


def overridden(inputs: Mapping[str, int], overrides: Mapping[str, str]) -> dict[str, Pattern | None]:
    """What the entries say of the weights that they speak of, None for "dense"; of several entries the last counts.

    Parameters
    ----------
    inputs : in_features of every weight that can be pruned, by the full name of its parameter
    overrides : entry → pattern or "dense". An entry is what `ignore` takes: a whole name, the last part of one, or a
        regular expression after "re:"; or, with a dot at its end, all that lies inside: "layers.0."

    Raises
    ------
    UserError
        for an entry that matches no weight, a pattern that cannot be read, or one that does not divide a weight.
    """
    found: dict[str, Pattern | None] = {}
    for entry, written in overrides.items():
        level = parse_level(written)
        names = [name for name in inputs if speaks_of(entry, name)]
        if not names:
            raise UserError(
                f"overrides: {entry!r} matches no weight that can be pruned. Write a whole name "
                f"({next(iter(inputs), '')}), the last part of one (down_proj), all inside a module, with a dot at the "
                "end (layers.0.), or a regular expression with 're:' before it."
            )
        for name in names:
            if level is not None and not level.fits(inputs[name]):
                raise UserError(
                    f"overrides: {entry!r} asks for {level}, but {name} has {inputs[name]} inputs, which do not divide "
                    f"into groups of {level}. Narrow the entry, or give another pattern."
                )
        found |= dict.fromkeys(names, level)
    return found


def speaks_of(entry: str, name: str) -> bool:
    """Whether an entry of the overrides means the weight of this full name."""
    if entry.endswith(".") and not entry.startswith("re:"):
        return f".{entry}" in f".{name}"
    return is_ignored(name, [entry])
