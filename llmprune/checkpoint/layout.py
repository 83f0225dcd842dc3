"""What a checkpoint holds on disk: names, axes and bytes of its tensors.

A model in memory and its files need not agree. transformers fuses Mixtral's experts into two 3-D parameters and
splits them again in `save_pretrained`; GPT-2 stores transposes; tied tensors are written once. Nothing here knows a
family. What is saved is found by sending the tensors through the conversion that `save_pretrained` itself uses
(`transformers.core_model_loading.revert_weight_conversion`), one decoder layer at a time, so that never more than a
layer's second copy exists. Where a pruned weight ends up is found by sending *markers* the same way: a tensor whose
values say "I am weight 7", and one whose values say "I belong to input 12".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmprune.errors import UnsupportedModel
from llmprune.model import shelf_of
from llmprune.results import PrunedWeight

__all__ = [
    "SavedWeight",
    "converted_parameters",
    "digest",
    "fingerprint",
    "hollow_tensors",
    "saved_names",
    "saved_tensors",
    "saved_ties",
    "saved_weights",
]

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: (start, stop) along every axis."""


@dataclass(frozen=True)
class SavedWeight:
    """Where a pruned weight, or some of its output rows, lies on disk."""

    weight: str
    """`PrunedWeight.name`."""
    tensor: str
    """Name in the checkpoint."""
    input_axis: int
    """The tensor's axis that runs over the weight's inputs, in their order and all of them."""
    box: Box | None
    """The block of the tensor that holds it, or None for all of it."""
    pattern: str
    """As `str(pattern)`."""
    scope: str
    """Where the zeros were counted out: "group", "row" or "matrix"."""

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The weight's rows, (rows, in_features), as they lie in `tensor`, which is the whole tensor of that name."""
        block = tensor if self.box is None else tensor[tuple(slice(*ends) for ends in self.box)]
        block = block.movedim(self.input_axis, -1)
        return block.reshape(-1, block.shape[-1])


def saved_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors exactly as `model.save_pretrained` writes them, in no particular order.

    Tensors that are saved as they are come as views of the model's own; converted ones are copies that live only as
    long as their layer's turn.
    """
    state, _ = _state(model)
    for names in _groups(model, state):
        loaded = {name: _loaded(model, name, state[name]) for name in names}
        yield from revert_weight_conversion(model, loaded).items()


def hollow_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what `saved_tensors` gives, without data ("meta"); the model may have none either."""
    state, _ = _state(model)
    return dict(revert_weight_conversion(model, _hollow(state)))


def converted_parameters(model: PreTrainedModel) -> set[str]:
    """Parameters that are saved in another form than the model holds, such as a stack of experts in its parts."""
    state, _ = _state(model)
    return state.keys() - set(_unchanged(model, state).values())


def saved_ties(model: PreTrainedModel) -> dict[str, str]:
    """Tensors that are not written because they are another one: name that is left out → name that is written."""
    state, ties = _state(model)
    written = {source: name for name, source in _unchanged(model, state).items()}
    return {_saved_name(model, dropped, state[kept]): written.get(kept, kept) for dropped, kept in ties.items()}


def saved_names(model: PreTrainedModel, parameters: Collection[str]) -> set[str]:
    """The names under which these parameters of the model are saved."""
    if not parameters:
        return set()
    state, ties = _state(model)
    homes = {ties.get(name, name) for name in parameters}
    direct = {source: name for name, source in _unchanged(model, state).items()}
    apart = (_shapes(revert_weight_conversion(model, _hollow({name: state[name]}))) for name in homes - direct.keys())
    return {direct[name] for name in homes & direct.keys()}.union(*apart)


def fingerprint(model: PreTrainedModel, names: Collection[str] | None = None) -> dict[str, str]:
    """The digest of every saved tensor, or of those in `names`."""
    return {name: digest(tensor) for name, tensor in saved_tensors(model) if names is None or name in names}


def digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and raw bytes, in hexadecimal."""
    kind = str(tensor.dtype).removeprefix("torch.")
    total = hashlib.sha256(f"{kind} {list(tensor.shape)}\n".encode())
    # A view as bytes: numpy has no bfloat16 and no float8.
    total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def saved_weights(model: PreTrainedModel, pruned: Sequence[PrunedWeight]) -> dict[str, tuple[SavedWeight, ...]]:
    """For every saved tensor that holds pruned weights: which, where, and along which axis their inputs run.

    One weight may be spread over several tensors (gate_up over gate and up) and one tensor may hold several weights
    (a 3-D tensor of experts). Only names, shapes and axes are read, so rows of a plan do as well as rows of a result.

    Raises
    ------
    UnsupportedModel
        if a pruned weight does not lie as whole rows in a block of a tensor, with its inputs in order.
    """
    state, ties = _state(model)
    homes = {row.name: ties.get(row.parameter, row.parameter) for row in pruned}
    found: list[SavedWeight] = []
    for names in _groups(model, state):
        rows = [row for row in pruned if homes[row.name] in names]
        if not rows:
            continue
        part = {name: state[name] for name in names}
        direct = {source: name for name, source in _unchanged(model, part).items()}
        found += [_as_is(row, direct[homes[row.name]]) for row in rows if homes[row.name] in direct]
        if converted := [row for row in rows if homes[row.name] not in direct]:
            found += _follow(model, converted, part, homes)
    tensors: dict[str, list[SavedWeight]] = {}
    for saved in found:
        tensors.setdefault(saved.tensor, []).append(saved)
    return {name: tuple(held) for name, held in tensors.items()}


def _state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What will be saved under the model's own names, and what is left out because it is tied: dropped → kept."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    kept = remove_tied_weights_from_state_dict(dict(state), model)
    owner = {_identity(model, name, tensor): name for name, tensor in kept.items()}
    ties = {name: owner[_identity(model, name, tensor)] for name, tensor in state.items() if name not in kept}
    return kept, ties


def _identity(model: PreTrainedModel, name: str, tensor: Tensor) -> tuple[object, ...]:
    if tensor.device.type == "meta":  # offloaded: the state dict holds fresh placeholders, the model the shared one
        return ("meta", id(model.get_parameter_or_buffer(name)))
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))


def _loaded(model: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    if tensor.device.type != "meta":
        return tensor
    shelf = shelf_of(model)
    return shelf.read(name) if shelf is not None else load_offloaded_parameter(model, name)


def _groups(model: PreTrainedModel, state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that can be converted apart from all others: decoder layers, and the rest one by one.

    Checked rather than believed: without data ("meta"), the groups must yield the very names and shapes that the whole
    yields. Where they do not, there is one group.
    """
    layers: dict[str, list[str]] = {}
    for name in state:
        match = re.match(r".*?\.\d+\.", name)
        layers.setdefault(match[0] if match else name, []).append(name)
    groups = list(layers.values())
    whole = _shapes(revert_weight_conversion(model, _hollow(state)))
    parts: dict[str, tuple[int, ...]] = {}
    for names in groups:
        parts |= _shapes(revert_weight_conversion(model, _hollow({name: state[name] for name in names})))
    return groups if parts == whole else [list(state)]


def _hollow(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _unchanged(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that the conversion hands on as they are, though perhaps renamed: saved name → model's name."""
    hollow = _hollow(state)
    names = {id(tensor): name for name, tensor in hollow.items()}
    return {
        saved: names[id(tensor)]
        for saved, tensor in revert_weight_conversion(model, dict(hollow)).items()
        if id(tensor) in names
    }


def _saved_name(model: PreTrainedModel, name: str, like: Tensor) -> str:
    saved: dict[str, Tensor] = revert_weight_conversion(model, _hollow({name: like}))
    return next(iter(saved))


def _as_is(row: PrunedWeight, name: str) -> SavedWeight:
    if row.expert is None:
        return SavedWeight(row.name, name, row.input_axis, None, row.pattern, row.scope)
    sides = row.shape if row.input_axis == 1 else row.shape[::-1]
    box = ((row.expert, row.expert + 1), (0, sides[0]), (0, sides[1]))
    return SavedWeight(row.name, name, row.input_axis + 1, box, row.pattern, row.scope)


def _follow(
    model: PreTrainedModel, rows: list[PrunedWeight], state: Mapping[str, Tensor], homes: Mapping[str, str]
) -> Iterator[SavedWeight]:
    """Send two markers of each weight through the conversion and see where they come out."""
    owners = {name: torch.zeros((), dtype=torch.int16).expand(tensor.shape) for name, tensor in state.items()}
    inputs = dict(owners)
    for number, row in enumerate(rows, start=1):
        name = homes[row.name]
        inputs[name] = _counting(state[name].shape, row.input_axis + (row.expert is not None))
        owners[name] = _marked(owners[name], number, row.expert)
    saved_owners = revert_weight_conversion(model, owners)
    saved_inputs = revert_weight_conversion(model, inputs)
    seen: set[int] = set()
    for name, marks in saved_owners.items():
        for number in _numbers(marks):
            row = rows[number - 1]
            seen.add(number)
            yield _located(row, name, marks == number, saved_inputs[name])
    if lost := [row.name for number, row in enumerate(rows, start=1) if number not in seen]:
        raise UnsupportedModel(f"{lost[0]} does not appear in the saved checkpoint ({len(lost)} such weights).")


def _counting(shape: torch.Size, axis: int) -> Tensor:
    """Each element's index along `axis`, modulo 2¹⁵, without the memory."""
    view = [1] * len(shape)
    view[axis] = -1
    return (torch.arange(shape[axis]) % 2**15).to(torch.int16).view(view).expand(shape)


def _marked(marks: Tensor, number: int, expert: int | None) -> Tensor:
    """`marks` with `number` in the expert's slice, or everywhere; as long as it can be, a view of few elements."""
    if expert is None:
        return torch.full((), number, dtype=torch.int16).expand(marks.shape)
    slices = marks[:, :1, :1].contiguous()
    slices[expert] = number
    return slices.expand(marks.shape)


def _numbers(marks: Tensor) -> list[int]:
    low, high = (int(end) for end in torch.aminmax(marks))
    found = [low] if low == high else torch.unique(marks).tolist()
    return [number for number in found if number]


def _located(row: PrunedWeight, name: str, mine: Tensor, inputs: Tensor) -> SavedWeight:
    """The block where `mine` is True, and its axis along which the inputs count up from 0 to the last."""
    box = tuple(_extent(mine, axis) for axis in range(mine.ndim))
    block = tuple(slice(*ends) for ends in box)
    whole = all(ends == (0, size) for ends, size in zip(box, mine.shape, strict=True))
    inside = inputs[block]
    axes = [
        axis
        for axis, size in enumerate(inside.shape)
        if size == row.shape[1] and torch.equal(inside, _counting(inside.shape, axis))
    ]
    if not axes or not bool(mine[block].all()):
        raise UnsupportedModel(
            f"{row.name} is saved within {name} in an order that its pattern would not survive, so it cannot be "
            "verified on disk: skip this weight."
        )
    return SavedWeight(row.name, name, axes[0], None if whole else box, row.pattern, row.scope)


def _extent(mine: Tensor, axis: int) -> tuple[int, int]:
    others = [other for other in range(mine.ndim) if other != axis]
    hits = (mine.amax(dim=others) if others else mine).nonzero()
    return int(hits[0]), int(hits[-1]) + 1
