"""Where each packed tensor of a checkpoint goes in a model, and what it is called on the way.

transformers renames a checkpoint's keys and merges tensors (one key an expert becomes a stack) by a list of
conversions. `place` follows every packed key through them and decides:

    a linear's own weight          → a SparseLinear in the linear's place, which takes values and index as they are
    anything else (fused experts)  → values and index are unpacked as they are read, then converted as usual

An index stands under its weight's key + "_index", which conversions made for weights do not always rename along; where
they do not, the list gets a renaming for it. Whatever cannot be followed is refused before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmprune.errors import UserError
from llmprune.runtime.sparse_linear import SparseLinear
from llmprune.sparsity.pack import ANY, row_starts

__all__ = ["INDEX", "UNPACKED", "Placement", "check_loaded", "entries", "input_axis_of", "place", "sparse_linears"]

INDEX = "_index"
"""What an index adds to its weight's key."""

UNPACKED = "llmprune_unpacked"
"""Attribute of a loaded model: how many packed weights became dense while it was loaded."""

LIKE_LINEAR = {"FalconLinear"}
"""Classes that multiply as nn.Linear does, in a `forward` of their own."""


@dataclass
class Placement:
    """What `place` decided.

    conversions : for transformers, in place of its own
    dense : keys on disk of the weights that are unpacked while they are loaded
    """

    conversions: list[Any]
    dense: list[str] = field(default_factory=list)
    _origins: dict[int, Any] = field(default_factory=dict)

    def originals(self, used: Iterable[Any]) -> list[Any]:
        """The conversions that were used, without what was added for unpacking: what saving has to revert."""
        kept = [self._origins.get(id(conversion), conversion) for conversion in used]
        return [conversion for conversion in kept if conversion is not None]


def place(model: nn.Module, weights: dict[str, dict[str, Any]], conversions: list[Any]) -> Placement:
    """Make room in a model that is still without tensors (on `meta`) for the packed `weights` of a checkpoint.

    weights : `LlmpruneConfig.weights`
    conversions : transformers' own, from keys on disk to the model's parameters

    Raises
    ------
    UserError
        if a weight's index would not arrive where the weight does.
    """
    from llmprune.runtime.unpack_on_load import Unpacking, exactly

    route = _Route(model, conversions, weights)
    merged: dict[str, dict[str, tuple[list[int], int]]] = {}
    added: list[Any] = []
    dense: list[str] = []
    for key, entry in weights.items():
        target, pattern = route.of(key)
        if target not in route.state:
            continue  # a part of the checkpoint that this model does not have, as the head for AutoModel
        about = (entry["shape"], entry["input_axis"])
        if pattern is not None:
            merged.setdefault(target, {})[pattern] = about
        elif _replace(model, target, entry):
            continue
        else:
            added.append(exactly(route.renamed(key), target, about))
        dense.append(key)
    used = {pattern for patterns in merged.values() for pattern in patterns}
    changed: list[Any] = []
    origins: dict[int, Any] = {id(conversion): None for conversion in added}
    for conversion in route.conversions:
        if used & set(conversion.source_patterns) and hasattr(conversion, "operations"):
            conversion, original = Unpacking.before(conversion, merged), conversion
            origins[id(conversion)] = original
        changed.append(conversion)
    placement = Placement([*added, *changed], dense, origins)
    _check_names(model, weights, placement.conversions)
    return placement


class _Route:
    """The way of a key on disk to a parameter of the model.

    conversions : the given ones, with renamings for the index where those for the weight do not serve
    state : the model's own parameters and buffers, on `meta`
    """

    def __init__(self, model: nn.Module, conversions: list[Any], keys: Iterable[str]) -> None:
        self.state: dict[str, torch.Tensor] = model.state_dict()
        self.prefix = getattr(model, "base_model_prefix", "")
        self.conversions = _with_index(conversions, keys)
        # Conversions remember what they met: what is tried here must not be seen there.
        self.renamings, self.converters = _parted(deepcopy(conversions))

    def of(self, key: str) -> tuple[str, str | None]:
        """(parameter, the converter's pattern that took the key; None if it is only renamed)."""
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None] = rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        if found[0] not in self.state and key in self.state:  # as transformers does: the key was meant as it is
            return key, None
        return found

    def renamed(self, key: str) -> str:
        """What the renamings alone make of a key, before the model's prefix is added or removed."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(key, self.renamings, [])[0])


def _parted(conversions: list[Any]) -> tuple[list[Any], list[Any]]:
    """(renamings, converters), each in its order."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    return renamings, [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]


def _with_index(conversions: list[Any], keys: Iterable[str]) -> list[Any]:
    """The conversions, and after each renaming that would leave an index behind another one for it."""
    from transformers.core_model_loading import WeightRenaming

    names, result = list(keys), []
    for conversion in conversions:
        result.append(conversion)
        if not isinstance(conversion, WeightRenaming):
            continue
        probe = deepcopy(conversion)
        renamed = [probe.rename_source_key(name)[0] for name in names]
        pairs = [(old, new) for old, new in zip(names, renamed) if old != new]
        if any(probe.rename_source_key(old + INDEX)[0] != new + INDEX for old, new in pairs):
            result.append(_renaming_of_index(conversion))
        names = renamed
    return result


def _renaming_of_index(renaming: Any) -> Any:
    from transformers.core_model_loading import WeightRenaming

    sources, targets = renaming._original_source_patterns, renaming._original_target_patterns
    companion = WeightRenaming([source + INDEX for source in sources], [target + INDEX for target in targets])
    companion.scope_prefix, companion.base_model_prefix = renaming.scope_prefix, renaming.base_model_prefix
    return companion


def _replace(model: nn.Module, target: str, entry: dict[str, Any]) -> bool:
    """Put a SparseLinear in the place of the linear that `target` is the weight of; False if there is none."""
    path, _, name = target.rpartition(".")
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    linear: Any = model.get_submodule(path)
    axis = input_axis_of(linear)
    if axis is None or name != "weight" or target in tied or target in tied.values():
        return False
    if entry["input_axis"] not in (axis, axis - 2) or [*linear.weight.shape] != entry["shape"]:
        return False
    sparse = SparseLinear(
        entry["shape"][axis],
        entry["shape"][1 - axis],
        pattern=entry["pattern"],
        kept=entry["kept"],
        bias=linear.bias is not None,
        input_axis=axis,
        dtype=linear.weight.dtype,
        device="meta",
    )
    model.set_submodule(path, sparse.train(linear.training))
    return True


def input_axis_of(module: nn.Module) -> int | None:
    """Which axis of a linear's weight is over its inputs; None if the module is no plain linear."""
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if isinstance(module, nn.Linear) and (forward is nn.Linear.forward or type(module).__name__ in LIKE_LINEAR):
        return 1
    return 0 if isinstance(module, Conv1D) and forward is Conv1D.forward else None


def _check_names(model: nn.Module, weights: Iterable[str], conversions: list[Any]) -> None:
    """Weight and index must take the same way through the final list."""
    route = _Route(model, [], [])
    route.renamings, route.converters = _parted(deepcopy(conversions))
    for key in weights:
        target, pattern = route.of(key)
        arrived = route.of(key + INDEX)
        expected = target + INDEX if pattern is None else target
        if target in route.state and arrived[0] != expected:
            raise UserError(
                f"transformers loads {key} as {target}, but its index as {arrived[0]}: this model's packed "
                "checkpoint cannot be loaded packed. Run `llmprune unpack` on it and load the result."
            )


# After loading --------------------------------------------------------------------------------------------------------


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """The packed linears of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def check_loaded(model: nn.Module) -> None:
    """Every index must mark as many values as there are in each row: kernels trust it and would read beyond the end.

    Raises
    ------
    UserError
        naming the first weight where it does not.
    """
    for name, module in sparse_linears(model).items():
        index = module.weight_index
        if index.is_meta or module.weight.is_meta:
            continue
        starts = row_starts(index)
        beyond = module.in_features % 8 and bool((index[:, -1] >> module.in_features % 8).any())
        even = module.pattern == ANY or bool((starts.diff() == module.weight.shape[1]).all())
        if beyond or not even or int(starts[-1]) != module.weight.numel():
            raise UserError(f"the index of {name}.weight does not fit to its values: the checkpoint is damaged.")


def entries(model: Any) -> dict[str, dict[str, Any]]:
    """`LlmpruneConfig.weights` of a model: its packed linears, by the names that `save_pretrained` gives them."""
    from transformers.core_model_loading import revert_weight_conversion

    modules = {id(module.weight): module for module in sparse_linears(model).values()}
    names: dict[str, torch.Tensor] = {f"{name}.weight": module.weight for name, module in sparse_linears(model).items()}
    return {key: _entry(modules[id(tensor)]) for key, tensor in revert_weight_conversion(model, names).items()}


def _entry(module: SparseLinear) -> dict[str, Any]:
    shape = [module.out_features, module.in_features]
    return {
        "pattern": module.pattern,
        "shape": shape if module.input_axis == 1 else shape[::-1],
        "input_axis": module.input_axis,
        "kept": module.weight.numel(),
    }
