"""One window through one layer, before anything is pruned: which weights it multiplies with, in what order.

The walk must know beforehand which weights come when, which of them share one input, and how much memory a batch
holds while it waits, so that every batch (and later every process) keeps to the same schedule. Routing differs from
window to window, so a stack of experts is scheduled as a whole: expert by expert, in the order of parameters seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmprune.walk.products import ALL, Product, Products, WeightKey

__all__ = ["Schedule", "Station", "survey_layer"]


@dataclass(frozen=True)
class Station:
    """A point where every batch pauses: the weights that meet one and the same input there.

    weights : in the order met
    repeated : the weight is met several times in one forward, so it can be solved only after the last time
    all_experts : one product takes all experts of a stack at once
    routed : a 2-D weight that met another number of tokens than the layer has, such as an expert in a list of modules
    """

    weights: tuple[WeightKey, ...]
    repeated: bool = False
    all_experts: bool = False
    routed: bool = False

    @property
    def comparable(self) -> bool:
        """Whether a dense forward has the same tokens here: routing differs, and a repeated weight has many inputs."""
        return not self.repeated and not self.routed and self.weights[0].expert is None


@dataclass(frozen=True)
class Schedule:
    """The stations of a layer in the order met, and the axis over the inputs of each parameter.

    input_axes : parameter → 1 where a matrix is stored as (out_features, in_features), 0 where transposed
    out_of_reach : matrices that no product was seen to use
    waiting_bytes : the most that one window holds in this layer while it waits
    """

    stations: tuple[Station, ...]
    input_axes: dict[str, int]
    out_of_reach: tuple[str, ...]
    waiting_bytes: int

    def without(self, names: set[str]) -> Schedule:
        """The same schedule with the parameters in `names` left dense."""
        kept = [tuple(key for key in station.weights if key.parameter not in names) for station in self.stations]
        stations = tuple(replace(s, weights=keys) for s, keys in zip(self.stations, kept, strict=True) if keys)
        axes = {name: axis for name, axis in self.input_axes.items() if name not in names}
        return replace(self, stations=stations, input_axes=axes)


@dataclass
class _Log:
    """Products as they come: (key, identity of the input). Inputs are held, so that no address is used twice."""

    meetings: list[tuple[WeightKey, tuple[Any, ...]]] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    axes: dict[str, int] = field(default_factory=dict)
    peak: int = 0


def survey_layer(
    layer: nn.Module, call: Callable[[nn.Module], Tensor], matrices: Sequence[str]
) -> tuple[Schedule, Tensor]:
    """Run `call(layer)` once and schedule the products with `matrices`, names of the layer's 2-D and 3-D parameters.

    Returns the schedule and the output of the call, (batch, seq_len, hidden_size).
    """
    parameters = dict(layer.named_parameters())
    log, live = _Log(), _LiveBytes(apart_from=parameters.values())

    def meet(product: Product) -> None:
        log.meetings.append((product.key, identity(product.inputs)))
        log.held.append(product.inputs)
        log.axes[product.key.parameter] = _input_axis(parameters[product.key.parameter], product.weight)
        log.peak = max(log.peak, live.bytes())

    with torch.no_grad(), live, Products(((name, parameters[name]) for name in matrices), meet):
        output = call(layer)
    missing = tuple(name for name in matrices if name not in log.axes)
    experts = {name: len(p) for name, p in parameters.items() if p.ndim == 3}
    tokens = output.shape[-3:-1].numel()
    routed = {key for (key, _), x in zip(log.meetings, log.held) if key.expert is None and len(x) != tokens}
    return Schedule(tuple(_stations(log.meetings, experts, routed)), log.axes, missing, log.peak), output


def identity(inputs: Tensor) -> tuple[Any, ...]:
    """Tells whether two live tensors are the same numbers in the same memory; views of one tensor are the same."""
    return (inputs.data_ptr(), inputs.numel(), inputs.shape[-1], inputs._version)


def _stations(
    meetings: Iterable[tuple[WeightKey, tuple[Any, ...]]], experts: dict[str, int], routed: set[WeightKey]
) -> list[Station]:
    """Group weights by input, mark the repeated ones, and spread every run of experts over all experts."""
    meetings = _spread_experts(list(meetings), experts)
    times: dict[WeightKey, int] = {}
    for key, _ in meetings:
        times[key] = times.get(key, 0) + 1
    groups: dict[Any, list[WeightKey]] = {}
    for key, shared in meetings:
        alone = times[key] > 1 or key.expert is not None
        group = groups.setdefault(key if alone else shared, [])
        if key not in group:
            group.append(key)
    return [
        Station(
            tuple(keys),
            repeated=times[keys[0]] > 1,
            all_experts=keys[0].expert == ALL,
            routed=keys[0] in routed,
        )
        for keys in groups.values()
    ]


def _spread_experts(
    meetings: list[tuple[WeightKey, tuple[Any, ...]]], experts: dict[str, int]
) -> list[tuple[WeightKey, tuple[Any, ...]]]:
    """Put all experts where the first slice of their stack was met: stacks of one size that alternate go together."""
    spread: list[tuple[WeightKey, tuple[Any, ...]]] = []
    done: set[str] = set()
    for position, (key, shared) in enumerate(meetings):
        if key.expert is None or key.expert == ALL:
            spread.append((key, shared))
        elif key.parameter not in done:
            count = experts[key.parameter]
            stacks = _alternating(meetings[position:], key, experts)
            spread += [(WeightKey(name, index), (name, index)) for index in range(count) for name in stacks]
            done.update(stacks)
    return spread


def _alternating(
    meetings: list[tuple[WeightKey, tuple[Any, ...]]], first: WeightKey, experts: dict[str, int]
) -> list[str]:
    """The stacks that the first expert's turn runs through, such as gate_up_proj and then down_proj."""
    stacks: list[str] = []
    for key, _ in meetings:
        if key.expert != first.expert or experts.get(key.parameter) != experts[first.parameter]:
            break
        if key.parameter not in stacks:
            stacks.append(key.parameter)
    return stacks


def _input_axis(parameter: Tensor, weight: Tensor) -> int:
    """1 where `weight` (…, out, in) lies in memory as its parameter does, 0 where it is the transpose of it."""
    return 1 if weight.stride()[-2:] == parameter.stride()[-2:] else 0


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that were made inside the `with` block and are still alive."""

    def __init__(self, apart_from: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.apart = {tensor.untyped_storage().data_ptr() for tensor in apart_from}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.apart:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        """Their sum now."""
        self.storages = {key: pair for key, pair in self.storages.items() if not pair[0].expired()}
        return sum(size for _, size in self.storages.values())
