"""Finding by structure what can be pruned in a model.

A decoder's layers are the outermost module list of the text decoder that holds the most parameters. Inside a layer the
matrices are its 2-D parameters and its 3-D stacks of matrices (transformers 5 keeps experts so). Names play no part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmprune.errors import UnsupportedModel, UserError
from llmprune.model.shelf import Shelf, shelf_of
from llmprune.results import SkippedWeight

__all__ = ["Decoder", "LayerMatrices", "decoder_of", "find_decoder", "matrices_of", "max_seq_len", "skipped_outside"]

IGNORED = "--ignore"
"""Why a matrix stays dense that the user has named."""

TOLERATED = 0.05
"""Share of a layer's matrix parameters that may be out of reach."""


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a model, the prefix of each one's parameter names (`model.layers.0.`), and the shelf that
    their weights rest on, if they do."""

    layers: list[nn.Module]
    prefixes: list[str]
    shelf: Shelf | None = None

    @contextmanager
    def turn(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights in memory, for a `with` block, while those of the next are read from the disk."""
        if self.shelf is None:
            yield self.layers[index]
            return
        with self.shelf.out(self.prefixes[index].rstrip(".")):
            for following in self.prefixes[index + 1 : index + 2]:
                self.shelf.expect(following.rstrip("."))
            yield self.layers[index]

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """All that is not in a layer with its weights in memory, for a `with` block: embeddings, norms, the head."""
        if self.shelf is None:
            yield
            return
        with self.shelf.out(*(unit for unit in self.shelf.units if f"{unit}." not in self.prefixes)):
            yield


@dataclass(frozen=True)
class LayerMatrices:
    """names : the layer's matrices to look for in products; skipped : those left dense on purpose, with the reason"""

    names: list[str]
    skipped: list[SkippedWeight]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of a model in memory, or on a shelf.

    Raises
    ------
    UnsupportedModel
        if there is no list of layers, a parameter stands in several layers, or weights are somewhere else.
    """
    decoder = decoder_of(model)
    _require_own_parameters(decoder)
    return decoder


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder layers of a model, whether its weights are in memory or not.

    Raises
    ------
    UnsupportedModel
        if there is no list of layers.
    """
    find_text: Callable[[], object] = getattr(model, "get_decoder", lambda: None)
    text = find_text()
    text = text if isinstance(text, nn.Module) else model
    lists = list(_outermost_lists(text))
    if not lists:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of decoder layers (an nn.ModuleList), so there is nothing to prune."
        )
    chosen = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    names = {id(module): name for name, module in model.named_modules()}
    layers = list(chosen)
    return Decoder(layers, [f"{names[id(layer)]}." for layer in layers], shelf_of(model))


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield child
        else:
            yield from _outermost_lists(child)


def _require_own_parameters(decoder: Decoder) -> None:
    owners: dict[int, int] = {}
    for index, layer in enumerate(decoder.layers):
        for name, parameter in layer.named_parameters():
            hollow = parameter.device.type == "meta"
            if hollow and decoder.shelf is None:
                raise UnsupportedModel(
                    f"{decoder.prefixes[index]}{name} is not in memory (device 'meta'). Load the model without "
                    "device_map or offloading; llmprune moves one layer at a time by itself."
                )
            if not parameter.numel():
                continue  # all of no size lie at address 0
            first = owners.setdefault(id(parameter) if hollow else parameter.data_ptr(), index)
            if first != index:
                raise UnsupportedModel(
                    f"{decoder.prefixes[index]}{name} is shared with decoder layer {first}. llmprune prunes models "
                    "whose layers have weights of their own."
                )


def matrices_of(layer: nn.Module, prefix: str, ignore: Sequence[str] = ()) -> LayerMatrices:
    """Sort a layer's matrices into those to prune and those to leave dense: routers, gates, convolutions, ignored.

    A router scores the experts: a matrix with one output per expert beside a stack of experts.
    """
    dense = _dense_by_structure(layer)
    names, skipped = [], []
    for name, parameter in layer.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        reason = dense.get(name) or (IGNORED if is_ignored(prefix + name, ignore) else None)
        if reason is None and parameter.ndim > 3:
            reason = f"{parameter.ndim}-D"
        if reason:
            skipped.append(SkippedWeight(prefix + name, tuple(parameter.shape), reason))
        else:
            names.append(name)
    return LayerMatrices(names, skipped)


def _dense_by_structure(layer: nn.Module) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for path, module in layer.named_modules():
        own = {f"{path}.{name}".lstrip("."): p for name, p in module.named_parameters(recurse=False)}
        if isinstance(module, nn.modules.conv._ConvNd):
            reasons |= dict.fromkeys(own, "a convolution")
        elif isinstance(module, nn.Embedding):
            reasons |= dict.fromkeys(own, "an embedding")
        else:
            reasons |= {name: "a gate with a single output" for name, p in own.items() if p.ndim == 2 and len(p) == 1}
            if isinstance(module, nn.ModuleList) and _are_alike(module):
                reasons |= dict.fromkeys(_routers(layer, path, len(module)), "a router")
            for experts in {len(p) for p in own.values() if p.ndim == 3}:
                reasons |= {
                    name: "biases of the experts" for name, p in own.items() if p.ndim == 2 and len(p) == experts
                }
                reasons |= dict.fromkeys(_routers(layer, path, experts), "a router")
    return reasons


def _routers(layer: nn.Module, path: str, experts: int) -> Iterable[str]:
    """Matrices with one output per expert, in the block that holds the module `path` with the experts; and all in a
    child of the block with a matrix of as many outputs, or one more, if the child is called a router or gate."""
    block = path.rpartition(".")[0]
    beside = {
        name: len(parameter)
        for name, parameter in layer.get_submodule(block).named_parameters()
        if parameter.ndim == 2 and not f"{block}.{name}".lstrip(".").startswith(f"{path}.")
    }
    children = {name.partition(".")[0] for name, rows in beside.items() if rows in (experts, experts + 1)}
    called = {child for child in children if "router" in child or "gate" in child.split("_")}
    for name, rows in beside.items():
        if rows == experts or name.partition(".")[0] in called:
            yield f"{block}.{name}".lstrip(".")


def _are_alike(modules: nn.ModuleList) -> bool:
    """Whether they are two modules or more that are built alike, as listed experts are."""
    shapes = [[(name, parameter.shape) for name, parameter in each.named_parameters()] for each in modules]
    return len(shapes) > 1 and bool(shapes[0]) and all(each == shapes[0] for each in shapes)


def is_ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a parameter's name matches an entry: the whole name, its last part, or a pattern after `re:`.

    The `.weight` at the end may be left out.
    """
    module = name.removesuffix(".weight")
    for entry in ignore:
        if entry.startswith("re:"):
            if re.match(entry[3:], name) or re.match(entry[3:], module):
                return True
        elif entry in (name, module, name.rpartition(".")[2], module.rpartition(".")[2]):
            return True
    return False


def check_ignore(model: nn.Module, ignore: Sequence[str]) -> None:
    """Raise UserError for an `ignore` entry that matches no parameter of the model: surely a slip."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for entry in ignore:
        if not any(is_ignored(name, [entry]) for name in names):
            example = next(iter(names), "")
            raise UserError(
                f"--ignore {entry!r} matches no weight of this model. Write a whole name ({example}), the last part of "
                "one (down_proj), or a regular expression with 're:' before it."
            )


def require_reach(prefix: str, layer: nn.Module, names: Sequence[str], out_of_reach: Sequence[str]) -> None:
    """Refuse a layer that multiplies with none of its matrices, or with less than 95 % of their parameters.

    Raises
    ------
    UnsupportedModel
        with the list, so that "success" never means that nothing was done.
    """
    sizes = {name: layer.get_parameter(name).numel() for name in names}
    missing = sum(sizes[name] for name in out_of_reach)
    if names and missing <= TOLERATED * sum(sizes.values()):
        return
    listed = ", ".join(f"{name} {tuple(layer.get_parameter(name).shape)}" for name in out_of_reach[:8])
    raise UnsupportedModel(
        f"in {prefix.rstrip('.')}, {missing / max(1, sum(sizes.values())):.0%} of the matrix parameters are not used "
        f"in a product that llmprune can see (at most {TOLERATED:.0%} are tolerated): "
        f"{listed or 'it has no matrices at all'}. "
        "Nothing was changed. If they should stay dense, name them with --ignore."
    )


def skipped_outside(model: nn.Module, decoder: Decoder) -> list[SkippedWeight]:
    """Matrices outside the decoder layers: embeddings, the head, other towers. They are never touched."""
    inside = tuple(decoder.prefixes)
    return [
        SkippedWeight(name, tuple(parameter.shape), "outside the decoder layers")
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.startswith(inside)
    ]


def max_seq_len(model: nn.Module) -> int | None:
    """How many tokens the model can take at once, from its configuration; None if it sets no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None
