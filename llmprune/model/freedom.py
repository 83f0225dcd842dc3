"""Which inner features of a decoder layer may change places without changing what the layer computes?

The neurons between two linears of a feed-forward part may: the columns of the second matrix move, and with them the
rows of the one or two matrices before it, and their biases. The value dimensions of an attention head may: the columns
of the output projection and the rows of the value projection; where query heads share a value head, they move alike.
Stored weights then have another order, and nothing else is different: no cost at run time.

Nothing is known by name. With the consuming matrix set to zero, parameters that act only through it have no gradient:
these alone can have rows to move. Which rows belong to which columns is tried out: layouts that occur, and the proof of
each is the layer itself, which in float64 must give the same outputs after random permutations. A layout that cannot
be proved does not exist.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Freedom", "Known", "Site", "apply", "find_freedoms", "prove"]

Call = Callable[[nn.Module], Tensor]

SAME = 1e-9
"""What a permutation may change in float64, relative to the layer's output."""

MOVED = 1e-6
"""The same relative to what moving the consumer alone changes: a proof must have been able to fail."""


@dataclass(frozen=True, eq=False)
class Site:
    """Where the units that move stand in one parameter.

    parameter : its name in the layer
    positions : (blocks, copies, size) int64: unit i of block b stands at `positions[b, :, i]` along `axis`
    axis : of the stored parameter, after taking the expert
    expert : index along the first axis of a 3-D parameter (2-D for its biases), or None
    """

    parameter: str
    positions: Tensor
    axis: int
    expert: int | None = None


@dataclass(frozen=True, eq=False)
class Freedom:
    """Units that may change places inside their block.

    kind : "neurons" or "value"
    consumer : the columns that move; its `positions` cover all inputs of the matrix
    producers : the rows, biases and gains that move with them
    """

    kind: str
    consumer: Site
    producers: tuple[Site, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(blocks, size) of a permutation."""
        return self.consumer.positions.shape[0], self.consumer.positions.shape[2]


def apply(layer: nn.Module, freedom: Freedom, permutation: Tensor) -> None:
    """Move the units in the layer's stored parameters, in place.

    Parameters
    ----------
    permutation : (blocks, size) int64; in block b the new unit i is the old unit `permutation[b, i]`
    """
    for site in (freedom.consumer, *freedom.producers):
        _move(layer, site, permutation)


def _move(layer: nn.Module, site: Site, permutation: Tensor) -> None:
    stored = layer.get_parameter(site.parameter).data
    stored = stored if site.expert is None else stored[site.expert]
    positions, permutation = site.positions.to(stored.device), permutation.to(stored.device)
    order = torch.arange(stored.shape[site.axis], device=stored.device)
    order[positions] = positions.gather(2, permutation[:, None].expand_as(positions))
    stored.copy_(stored.index_select(site.axis, order))


Known = dict[tuple[object, ...], list[Freedom]]
"""Freedoms by the names and shapes of a layer's parameters."""


def find_freedoms(layer: nn.Module, call: Call, axes: Mapping[str, int], known: Known | None = None) -> list[Freedom]:
    """The freedoms of a layer, each proved on it.

    Parameters
    ----------
    layer : not changed; a copy in float64 is made for the time of the search
    call : runs a layer on one short window in float64: hidden states, masks and tables are float64 too. Gradients
        must be able to flow through it
    axes : the matrices that may be changed, in the order in which the layer multiplies with them, and which of the
        last two axes runs over the inputs: 1, or 0 where the transpose is stored (as `Schedule.input_axes` has them)
    known : what was found in the layers before, which is tried first; grows

    Returns
    -------
    one freedom for each consuming matrix that has one; in a stack of experts one for each expert. None for a layer
    that cannot be computed in float64 or differentiated: nothing can be proved on it.
    """
    known = {} if known is None else known
    key = tuple((name, p.shape, axes.get(name)) for name, p in layer.named_parameters())
    try:
        twin = _float64(layer)
        truth = _run(twin, call)
        search = None
        if key not in known or not _holds(twin, call, truth, known[key]):
            search = _Search(twin, call, truth, dict(axes))  # differentiates it
    except MemoryError:
        raise
    except Exception as error:  # layers refuse float64, copying and differentiation in many ways
        if isinstance(error, RuntimeError) and _lacks_memory(error):
            raise
        return []
    if search is not None:
        known[key] = search.all()
    return known[key]


def _lacks_memory(error: RuntimeError) -> bool:
    """On a CPU torch has no class of its own for this."""
    words = ("DefaultCPUAllocator", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def prove(layer: nn.Module, call: Call, freedoms: Sequence[Freedom]) -> bool:
    """Whether random permutations of all `freedoms` at once leave the layer's output as it is, in float64."""
    twin = _float64(layer)
    return _holds(twin, call, _run(twin, call), freedoms)


def _float64(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double().eval()


def _run(layer: nn.Module, call: Call) -> Tensor:
    with torch.no_grad(), _Float64():
        return call(layer)


class _Float64(TorchFunctionMode):
    """Whatever a layer casts to another floating dtype becomes float64: norms and softmax like to take float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16"):
            return args[0].double()
        args = [torch.float64 if _is_float(arg) else arg for arg in args]
        kwargs = {name: torch.float64 if _is_float(arg) else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _is_float(argument: object) -> bool:
    return isinstance(argument, torch.dtype) and argument.is_floating_point


def _holds(layer: nn.Module, call: Call, truth: Tensor, freedoms: Sequence[Freedom]) -> bool:
    """The proof. The layer is as it was afterwards: moving is exact."""
    if not freedoms:
        return True
    generator = torch.Generator().manual_seed(0)
    permutations = [_cycle(f.shape, generator) for f in freedoms]
    for freedom, permutation in zip(freedoms, permutations):
        _move(layer, freedom.consumer, permutation)
    torn = _distance(_run(layer, call), truth)
    for freedom, permutation in zip(freedoms, permutations):
        for site in freedom.producers:
            _move(layer, site, permutation)
    whole = _distance(_run(layer, call), truth)
    for freedom, permutation in zip(freedoms, permutations):
        apply(layer, freedom, permutation.argsort(1))
    return whole <= SAME < torn and whole <= MOVED * torn


def _cycle(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random permutations (blocks, size) that leave no unit where it is."""
    order = torch.rand(shape, generator=generator).argsort(1)
    return torch.empty_like(order).scatter_(1, order, order.roll(1, 1))


def _distance(output: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(output - truth) / torch.linalg.vector_norm(truth))


class _Search:
    """Tries layouts on a float64 copy of a layer."""

    def __init__(self, layer: nn.Module, call: Call, truth: Tensor, axes: dict[str, int]) -> None:
        self.layer, self.call, self.truth, self.axes = layer, call, truth, axes
        self.parameters = dict(layer.named_parameters())
        self.heard = [name for name, slope in self._slopes().items() if slope.any()]  # by the output

    def all(self) -> list[Freedom]:
        """Of every matrix, as far as they also hold together."""
        found: list[Freedom] = []
        for name in self.axes:
            mine = self.of_consumer(name)
            if _holds(self.layer, self.call, self.truth, [*found, *mine]):
                found += mine
        return found

    def of_consumer(self, name: str) -> list[Freedom]:
        """The freedom of one matrix, or of each expert of a stack."""
        consumer = self.parameters[name]
        inputs = consumer.shape[-1] if self.axes[name] == 1 else consumer.shape[-2]
        before = list(self.axes)[: list(self.axes).index(name)]
        through = self._only_through(name) if before else []
        rows = {
            other: self._rows(other)
            for other in before
            if other in through and self.parameters[other].ndim == consumer.ndim
        }
        biases = {other: self._biases(other) for other in rows}
        beside = {bias for names in biases.values() for bias in names}
        # The gains of a norm right before the consumer stand like its columns.
        gains = [other for other in through if self.parameters[other].shape == (inputs,) and other not in beside]
        for layout in _layouts(inputs, rows, experts=consumer.ndim == 3):
            moved = {**layout.rows, **{bias: at for other, at in layout.rows.items() for bias in biases[other]}}
            for producers in [moved, moved | dict.fromkeys(gains, layout.columns)] if gains else [moved]:
                found = self._freedoms(name, layout, producers)
                if _holds(self.layer, self.call, self.truth, found):
                    return found
        return []

    def _freedoms(self, name: str, layout: _Layout, producers: Mapping[str, Tensor]) -> list[Freedom]:
        consumer = Site(name, layout.columns, self.axes[name])
        sites = tuple(Site(n, at, self._row_axis(n)) for n, at in producers.items())
        if self.parameters[name].ndim == 2:
            return [Freedom(layout.kind, consumer, sites)]
        return [
            Freedom(layout.kind, replace(consumer, expert=e), tuple(replace(site, expert=e) for site in sites))
            for e in range(len(self.parameters[name]))
        ]

    def _row_axis(self, name: str) -> int:
        return 1 - self.axes[name] if name in self.axes else 0

    def _rows(self, name: str) -> int:
        shape = self.parameters[name].shape
        return shape[-2] if self.axes[name] == 1 else shape[-1]

    def _biases(self, name: str) -> list[str]:
        """Parameters beside a matrix with one entry for each of its rows."""
        path, matrix = name.rpartition(".")[0], self.parameters[name]
        shape = (*matrix.shape[:-2], self._rows(name))
        own = self.layer.get_submodule(path).named_parameters(recurse=False)
        return [f"{path}.{bias}".lstrip(".") for bias, parameter in own if parameter.shape == shape]

    def _only_through(self, name: str) -> list[str]:
        """Parameters that the output depends on through the matrix `name` alone."""
        with torch.no_grad():
            kept = self.parameters[name].clone()
            self.parameters[name].zero_()
        slopes = self._slopes()
        with torch.no_grad():
            self.parameters[name].copy_(kept)
        return [other for other in self.heard if other != name and not slopes[other].any()]

    def _slopes(self) -> dict[str, Tensor]:
        """Gradients of a random projection of the output."""
        parameters = {name: p.requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            with _Float64():
                output = self.call(self.layer)
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            slopes = torch.autograd.grad(
                (output * weights.to(output.device)).sum(), list(parameters.values()), allow_unused=True
            )
        return {n: torch.zeros(1) if slope is None else slope for n, slope in zip(parameters, slopes)}


@dataclass(frozen=True)
class _Layout:
    """A guess: the columns of the consumer, and the rows of the matrices that move with them."""

    kind: str
    columns: Tensor
    rows: dict[str, Tensor]


def _layouts(inputs: int, rows: Mapping[str, int], *, experts: bool) -> Iterator[_Layout]:
    """Guesses for a consumer with so many inputs, of matrices with so many rows that act only through it."""
    if rows and set(rows.values()) <= {inputs, 2 * inputs}:
        yield from _neuron_layouts(inputs, rows)
    if not experts:
        for name in reversed(list(rows)):  # the value projection is mostly the last one met
            gates = {other: count for other, count in rows.items() if other != name and count in (inputs, 2 * inputs)}
            for layout in _value_layouts(inputs, name, rows[name]):
                yield layout
                for other in gates:
                    yield replace(layout, rows={**layout.rows, other: _gate_rows(layout.columns, gates[other])})


def _neuron_layouts(inputs: int, rows: Mapping[str, int]) -> Iterator[_Layout]:
    """One row for each column, or two: in two halves, or side by side."""
    single = torch.arange(inputs).view(1, 1, inputs)
    halves = torch.arange(2 * inputs).view(1, 2, inputs)
    pairs = torch.arange(2 * inputs).view(1, inputs, 2).mT.contiguous()
    for double in (halves, pairs) if 2 * inputs in rows.values() else (halves,):
        yield _Layout("neurons", single, {n: single if count == inputs else double for n, count in rows.items()})


def _value_layouts(inputs: int, name: str, rows: int) -> Iterator[_Layout]:
    """(value heads, query heads a value head, head_dim) columns, (value heads, 1, head_dim) rows; largest heads first.

    The matrix is the value projection alone, or queries, keys and values together: values last of all, or last in
    each head's part of it. Or it makes keys and values of each head from a compressed form (DeepSeek's MLA).
    """
    for size in (size for size in range(inputs, 1, -1) if inputs % size == 0):
        for values, last_in_each in _value_counts(inputs, rows, size):
            heads = values // size
            if values % size or inputs % values or (last_in_each and rows % heads):
                continue
            columns = torch.arange(inputs).view(heads, inputs // values, size)
            starts = torch.arange(heads) * (rows // heads if last_in_each else size)
            starts += rows // heads - size if last_in_each else rows - values
            yield _Layout("value", columns, {name: (starts[:, None] + torch.arange(size))[:, None]})


def _value_counts(inputs: int, rows: int, size: int) -> list[tuple[int, bool]]:
    """How many of `rows` may be values, if heads have `size` dimensions, and whether they stand last in each head."""
    if rows <= inputs and inputs % rows == 0:
        return [(rows, False)]
    fused = (rows - inputs) // 2
    guesses = product([fused], [False, True]) if fused > 0 and (rows - inputs) % 2 == 0 else ()
    compressed = [(inputs, True)] if rows > inputs and rows != 3 * inputs else []
    return [*guesses, *compressed]


def _gate_rows(columns: Tensor, rows: int) -> Tensor:
    """Rows of a matrix that gates the heads' outputs: one for each column, alone or after each query head's query."""
    if rows == columns.numel():
        return columns
    size = columns.shape[2]
    return columns + (columns // size + 1) * size
