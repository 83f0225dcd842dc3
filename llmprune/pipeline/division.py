"""A stack of weights solved by several processes, each some of its rows, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.distributed import Team
from llmprune.recipe import Recipe, Solved
from llmprune.sparsity.parts import parts_of
from llmprune.sparsity.pattern import Pattern, Unstructured
from llmprune.sparsity.statistics import Statistic

__all__ = ["solve_divided"]


def solve_divided(
    recipe: Recipe,
    weight: Tensor,
    statistic: Statistic | None,
    pattern: Pattern,
    *,
    rows: Sequence[int],
    held: Statistic | None,
    centred: bool,
    team: Team,
) -> Solved:
    """What `recipe.solve` gives, the same bits in every process. Arguments as there; statistics are those of all.

    Where the zeros of a whole matrix are counted out together, a linear is one process's; else rows are divided evenly.
    """
    if team.size == 1:
        return recipe.solve(weight, statistic, pattern, rows=rows, held=held, centred=centred)
    counted_out = isinstance(pattern, Unstructured) and recipe.method.scope == "matrix"
    parts = parts_of(rows, team.size, whole_linears=counted_out)
    mine = parts[team.rank]
    own = slice(mine.start, mine.stop)
    solved = recipe.solve(
        weight[own], statistic, pattern, rows=mine.rows, held=held, centred=centred, pooled=team.pooled
    )
    whole, mask = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    whole[own], mask[own] = solved.solution.weight, solved.solution.mask
    cuts = [(part.start, part.stop) for part in parts]
    team.exchange(whole, cuts)
    team.exchange(mask, cuts)
    return Solved(replace(solved.solution, weight=whole, mask=mask), solved.steps)
