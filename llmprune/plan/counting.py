"""What a computation takes, counted while it runs: products, memory traffic, calls, and the most that it holds at once.

A small instance of a piece of work runs under `Counter`; `scaled` says what the same work takes at its real size. So
the code that is planned for is the code that is counted, and a change of a solver changes the plan with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Counter", "Work", "extrapolated"]

VIEWS = ("view", "expand", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze", "split", "unbind")
"""Beginnings of the names of operations that move no data."""


@dataclass(frozen=True)
class Work:
    """products : floating-point operations of matrix products
    attention : of products between tokens, which grow with the square of a window
    factorings : of Cholesky factors, inverses and triangular solves
    moved : bytes that all other operations read and write
    calls : operations
    peak : the most bytes that were alive at once, beyond those that were before
    """

    products: float = 0.0
    attention: float = 0.0
    factorings: float = 0.0
    moved: float = 0.0
    calls: float = 0.0
    peak: float = 0.0

    def __add__(self, other: Work) -> Work:
        """One after the other: sums, and the larger peak."""
        values = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Work(**values | {"peak": max(self.peak, other.peak)})

    def times(self, count: float) -> Work:
        """The same work so many times over."""
        return Work(**{f.name: getattr(self, f.name) * count for f in fields(self)} | {"peak": self.peak})


def extrapolated(count: Callable[[int], Work], size: int, target: int) -> Work:
    """The work at a size of `target`, from two counts at `size` and its double.

    Every quantity is taken for a sum of two powers of the size: matrix products and factorings of its square and its
    cube (an update of a block of fixed width is a square, one of all that follows a cube), memory of the first and the
    second power, calls of none and the first. Where the target is no larger than `size`, it is counted itself.
    """
    if target <= size:
        return count(target)
    small, large, ratio = count(size), count(2 * size), target / size
    powers = {"products": (2, 3), "factorings": (2, 3), "moved": (1, 2), "calls": (0, 1), "peak": (1, 2)}
    found = {
        name: _two_powers(getattr(small, name), getattr(large, name), low, high, ratio)
        for name, (low, high) in powers.items()
    }
    return Work(**found)


def _two_powers(small: float, large: float, low: int, high: int, ratio: float) -> float:
    """a · rˡᵒʷ + b · rʰⁱᵍʰ at `ratio`, where it is `small` at 1 and `large` at 2, both shares at least 0."""
    b = min(max((large - small * 2**low) / (2**high - 2**low), 0.0), small)
    return float((small - b) * ratio**low + b * ratio**high)


class Counter(TorchDispatchMode):
    """Counts what runs inside the `with` block; read `work` afterwards.

    What was made before it began counts neither as memory nor as made; reading and writing it counts as traffic.

    Parameters
    ----------
    spent : tensors that were made before and may be let go inside the block, which makes room for others
    """

    def __init__(self, spent: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in spent:
            self._watch(tensor)
        self._before = self._alive()
        self._totals = dict.fromkeys(("products", "attention", "factorings", "moved", "calls", "peak"), 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        old = {leaf.untyped_storage()._cdata for leaf in given}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._count(func, args, kwargs or {}, given=given, made=made)
        for tensor in made:
            if tensor.untyped_storage()._cdata not in old:
                self._watch(tensor)
        self._storages = {key: pair for key, pair in self._storages.items() if not pair[0].expired()}
        inside = _inside(func.overloadpacket.__name__, given)
        self._totals["peak"] = max(self._totals["peak"], inside + self._alive() - self._before)
        self.work = Work(**self._totals)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def _alive(self) -> int:
        return sum(size for _, size in self._storages.values())

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], *, given: list[Tensor], made: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name.startswith(VIEWS) or name in ("detach", "alias", "t", "lift_fresh"):
            return
        self._totals["calls"] += 1
        if name in FACTORINGS:
            self._totals["factorings"] += FACTORINGS[name](given)
        elif "attention" in name:
            self._totals["attention"] += _attention(given)
        elif name in ("bmm", "baddbmm"):  # attention written out; experts are multiplied one by one
            self._totals["attention"] += flop_registry[func.overloadpacket](*args, **kwargs, out_val=made[0])
        elif (packet := _packet(func)) in flop_registry:
            self._totals["products"] += flop_registry[packet](*args, **kwargs, out_val=made[0])
        else:
            self._totals["moved"] += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))


def _inside(name: str, given: list[Tensor]) -> int:
    """Bytes that an operation on a CPU holds besides what it is given and returns: copies that LAPACK writes to, and
    the pairs of value and index that `topk` sorts, of one row at a time."""
    if name in FACTORINGS:
        return max(tensor.numel() * tensor.element_size() for tensor in given)
    return 16 * given[0].shape[-1] if name == "topk" and given[0].ndim else 0


def _packet(func: Any) -> Any:
    """The operation, of one that works in place its plain form."""
    return getattr(torch.ops.aten, func.overloadpacket.__name__.rstrip("_"), func.overloadpacket)


def _attention(given: list[Tensor]) -> float:
    """Products of queries (…, heads, tokens, head_dim) with keys and of weights with values: 4 · heads · tokens² · dim,
    half of it where the mask is causal, which is not looked at."""
    query, key = given[0], given[1]
    return 4.0 * query.numel() * key.shape[-2]


def _cholesky(given: list[Tensor]) -> float:
    return float(given[0].shape[-1] ** 3 / 3)


def _inverse(given: list[Tensor]) -> float:
    return float(given[0].shape[-1] ** 3 * 2 / 3)


def _solve(given: list[Tensor]) -> float:
    """side² for each column of the right side, which comes before the square matrix or after it."""
    one, other = given[:2]
    matrix, right = (one, other) if one.shape[-1] == one.shape[-2] else (other, one)
    return float(matrix.shape[-1] * right.numel())


FACTORINGS: dict[str, Callable[[list[Tensor]], float]] = {
    "linalg_cholesky_ex": _cholesky,
    "cholesky_inverse": _inverse,
    "linalg_solve_triangular": _solve,
    "cholesky_solve": lambda given: 2 * _solve(given),
}
"""Floating-point operations of the factorings that the solvers use."""
