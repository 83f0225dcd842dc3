"""Options from a file: `--config run.yaml`, or the config.json of a pruned model.

What is typed goes before what a file says, and what a file says before what the command does by itself.
"""

from __future__ import annotations

import json
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

__all__ = ["evaluation_options", "read_config", "typed_first"]

NOTHING = (None, "", "null", "~")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
"""As YAML and JSON have them; YAML's are read as text."""


def read_config(ctx: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Settings from a file become the defaults of this command. Those that only a run has are passed over by its plan.

    Raises
    ------
    BadParameter
        if the file cannot be read, names what is no option, or gives one a value of the wrong kind.
    """
    if path is None:
        return None
    settings = _parse(path)
    if isinstance(settings, dict) and "llmprune_config" in settings:
        from llmprune.config import asked_for

        settings = asked_for(settings["llmprune_config"])  # the config.json of a pruned model: do the same again
    if not isinstance(settings, dict):
        raise click.BadParameter(f"{path} holds no settings; it should read like  sparsity: 2:4")
    settings.pop("llmprune_version", None)
    known, elsewhere = _by_name(ctx.command), _by_name(ctx.find_root().command)
    defaults: dict[str, Any] = {}
    for written, value in settings.items():
        name = str(written).replace("-", "_")
        if name in known:
            if value not in NOTHING:
                defaults |= _default(known[name], value, f"{path}: {written}")
        elif name not in elsewhere:
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise click.BadParameter(
                f"{path} sets {written}, which is no option; {meant}Options: {', '.join(sorted(known))}."
            )
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def typed_first(options: dict[str, Any]) -> None:
    """A method that was typed goes before an effort that stands in a file, which would choose a method itself, and an
    effort that was typed before a file's method."""
    source = click.get_current_context().get_parameter_source
    for typed, other in (("method", "effort"), ("effort", "method")):
        if source(typed) is ParameterSource.COMMANDLINE and source(other) is ParameterSource.DEFAULT_MAP:
            options[other] = None


def evaluation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that say what is measured, taken out of `options`; with --no-eval, nothing is."""
    from llmprune.config import EvaluationConfig

    taken = {each.name: options.pop(each.name) for each in fields(EvaluationConfig) if each.name in options}
    return taken | {"eval_dataset": (), "eval_tasks": ()} if options.pop("no_eval") else taken


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
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "cannot be read"
        where = "" if mark is None else f" (line {mark.line + 1}: {problem})"
        cure = "it should read like  sparsity: 2:4"
        raise click.BadParameter(f"{path} is neither JSON nor YAML{where}; {cure}") from None


def _by_name(command: click.Command) -> dict[str, click.Option]:
    """The options that a file may set, under the names that are typed after `--`."""
    options = [each for each in command.params if isinstance(each, click.Option) and not each.is_eager]
    return {name.lstrip("-").replace("-", "_"): each for each in options for name in each.opts if name.startswith("--")}


def _default(option: click.Option, value: Any, where: str) -> dict[str, Any]:
    """The option's default as click takes it; none where its value says that it is left out.

    click itself would make 64 of 64.5, 1 of true, and text of a list.
    """
    name = str(option.name)
    if option.multiple:
        return {name: _several(value)}
    if isinstance(value, list | dict):
        raise click.BadParameter(f"{where} takes one value; got {json.dumps(value)}.")
    if not option.is_flag and isinstance(option.flag_value, str):  # one that may stand alone, or with a value
        said = str(value).lower()
        return {} if said in FALSE else {name: option.flag_value if said in TRUE else value}
    whole = isinstance(option.type, click.types.IntParamType)
    numeric = whole or isinstance(option.type, click.types.FloatParamType)
    if numeric and (isinstance(value, bool) or (whole and isinstance(value, float) and not value.is_integer())):
        raise click.BadParameter(f"{where} is {'a whole' if whole else 'a'} number; got {json.dumps(value)}.")
    return {name: value}


def _several(value: Any) -> list[Any]:
    """A list as it is; a single value is a list of one, and `down_proj: 4:8` is down_proj=4:8, nothing is dense."""
    if isinstance(value, dict):
        return [f"{key}={'dense' if one in NOTHING else one}" for key, one in value.items()]
    return value if isinstance(value, list) else [value]
