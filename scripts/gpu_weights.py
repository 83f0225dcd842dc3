"""Random weights for measurements on a GPU, and the forms in which candidates read them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from gpu_rows import copies_for, kind
from kernel_benchmarks import Case
from torch import Tensor

from llmprune.sparsity.pack import Packed, pack
from llmprune.sparsity.pattern import NM, parse_pattern

if TYPE_CHECKING:
    from gpu_candidates import GpuCandidate

__all__ = ["DTYPE", "Weight", "copied", "form_bytes", "kept_entries"]

DTYPE = torch.bfloat16

FEWEST_GROUP = 4
"""Columns of a group in 2:4."""

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


class Weight:
    """A random weight (rows, columns) in bfloat16 with a pattern, on a device, and its forms.

    Which entries are zero is drawn at random and not chosen by size, which makes no difference to time. At 2:4 each
    group keeps one of the six pairs; else each entry is kept by itself, so that rows differ in length as those of
    SparseGPT do.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case = case
        self.pattern = kind(case.pattern)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.rows, case.columns)
        self.dense = torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=generator)
        kept = kept_entries(shape, case.pattern, generator)
        self.dense.masked_fill_(~kept, 0)
        self._forms: dict[tuple[str, str], list[Any]] = {}

    @cached_property
    def packed(self) -> Packed:
        """As on disk."""
        return pack(self.dense, self.pattern)

    def forms(self, way: GpuCandidate, config: str, cache: int) -> list[Any]:
        """Copies of the form that a candidate reads, which together exceed the cache; kept until another one's."""
        key = (way.form_name, way.form_key(config))
        if key not in self._forms:
            for other in [other for other in self._forms if other[0] == key[0]]:
                del self._forms[other]
            first = way.form(self, config)
            count = copies_for(form_bytes(first), cache)
            self._forms[key] = [first, *(way.another(self, config, first) for _ in range(count - 1))]
        return self._forms[key]


def kept_entries(shape: tuple[int, int], pattern: str, generator: torch.Generator) -> Tensor:
    """bool (rows, columns), drawn at random."""
    parsed, device = parse_pattern(pattern), generator.device
    if isinstance(parsed, NM):
        assert (parsed.n, parsed.m) == (2, FEWEST_GROUP), pattern
        table = torch.zeros(len(PAIRS), FEWEST_GROUP, dtype=torch.bool)
        for place, pair in enumerate(PAIRS):
            table[place, list(pair)] = True
        chosen = torch.randint(len(PAIRS), (shape[0], shape[1] // FEWEST_GROUP), generator=generator, device=device)
        return table.to(device)[chosen].view(shape)
    return torch.rand(shape, generator=generator, device=device) >= parsed.sparsity


def copied(form: Any) -> Any:
    """The same tensors in other memory."""
    if isinstance(form, Tensor):
        return form.clone()
    if is_dataclass(form) and not isinstance(form, type):
        held = {field.name: getattr(form, field.name) for field in fields(form)}
        return replace(form, **{name: copied(part) for name, part in held.items() if isinstance(part, Tensor)})
    return tuple(copied(part) for part in form)


def form_bytes(form: Any) -> int:
    """Bytes of its tensors."""
    if is_dataclass(form) and not isinstance(form, type):
        return sum(form_bytes(getattr(form, field.name)) for field in fields(form) if _is_tensor(form, field.name))
    if isinstance(form, Tensor):
        packed = [getattr(form, name, None) for name in ("packed", "meta")]  # torch's own sparse tensors
        return sum(part.nbytes for part in packed if part is not None) or int(form.nbytes)
    return sum(form_bytes(part) for part in form)


def _is_tensor(form: Any, name: str) -> bool:
    return isinstance(getattr(form, name), Tensor)
