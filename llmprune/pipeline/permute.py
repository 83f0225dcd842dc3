"""Before a layer is walked, its free inner features change places, so that N:M keeps more of what matters.

What the layer computes stays the same; only the order in which it is stored changes, and with it which inputs share a
group. The norms that the choice goes by are taken from the dense layer on a few windows: it must be made before the
first weight of the layer is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from llmprune.distributed import Team
from llmprune.model.freedom import Freedom, Known, Site, apply, find_freedoms
from llmprune.sparsity.pattern import NM, Pattern
from llmprune.sparsity.permutation import Arrangement, search
from llmprune.sparsity.statistics import FeatureNorm
from llmprune.walk.products import Product, Products
from llmprune.walk.recorder import Recording
from llmprune.walk.survey import Schedule

__all__ = ["WINDOWS", "Permuter"]

WINDOWS = 2
"""Windows that the norms are taken from. Weights alone would bring most of the gain already."""

PROOF_TOKENS = 16
"""Tokens of the window on which a freedom is proved, in float64."""


class Permuter:
    """Orders the inner features of one layer after the other.

    Parameters
    ----------
    proof : what the layers are called with on one short window, all in float64
    team : rank 0 chooses, on the windows of all, and all do the same

    Attributes
    ----------
    free : in how many weights so far inputs could change places
    """

    def __init__(self, proof: Recording, team: Team | None = None) -> None:
        self.proof, self.team = proof, team or Team()
        self.known: Known = {}
        self.free = 0

    def permute(
        self,
        layer: nn.Module,
        index: int,
        schedule: Schedule,
        *,
        patterns: Mapping[str, Pattern],
        hidden: Sequence[Tensor],
        call: Callable[[nn.Module, Tensor, int], Tensor],
    ) -> set[str]:
        """Change places in a layer that is still dense.

        patterns : of the layer's parameters. Inputs change places where theirs is N:M, as its groups want it
        hidden, call : the layer's inputs, one batch each, and how it is called with one of them: (layer, states,
            batch); of all batches, those among the first `WINDOWS` that are this process's

        Returns
        -------
        names of the parameters that changed
        """
        window = self.proof.hidden[0]
        found = self.team.decided(
            lambda: find_freedoms(
                layer, lambda copied: self.proof.calls[index][0](copied, window), schedule.input_axes, self.known
            )
        )
        self.proof.calls[index] = []
        grouped = {name: pattern for name, pattern in patterns.items() if isinstance(pattern, NM)}
        freedoms = [freedom for freedom in found if freedom.consumer.parameter in grouped]
        self.free += len(freedoms)
        norms = self._norms(layer, freedoms, hidden=hidden, call=call)
        changed: set[str] = set()
        for freedom in freedoms:
            name = freedom.consumer.parameter
            weight, pattern, norm = _weight(layer, freedom, schedule), grouped[name], norms.get(name)
            order = self.team.decided(partial(_order, weight, freedom.consumer, pattern, norm))
            if order.dropped < order.dropped_before:
                apply(layer, freedom, order.permutation)
                changed |= {site.parameter for site in (freedom.consumer, *freedom.producers)}
        return changed

    def _norms(
        self,
        layer: nn.Module,
        freedoms: Sequence[Freedom],
        *,
        hidden: Sequence[Tensor],
        call: Callable[[nn.Module, Tensor, int], Tensor],
    ) -> dict[str, FeatureNorm]:
        norms: dict[str, FeatureNorm] = {}

        def meet(product: Product) -> None:
            if product.key.expert is None:
                name, width = product.key.parameter, product.inputs.shape[-1]
                norms.setdefault(name, FeatureNorm(width, product.inputs.device)).update(product.inputs)

        consumers = dict.fromkeys(freedom.consumer.parameter for freedom in freedoms)
        with torch.no_grad(), Products([(name, layer.get_parameter(name)) for name in consumers], meet):
            for batch, states in enumerate(hidden if consumers else ()):
                call(layer, states, batch)
        self._pool(norms, layer, [freedom.consumer for freedom in freedoms])
        return norms

    def _pool(self, norms: dict[str, FeatureNorm], layer: nn.Module, consumers: Sequence[Site]) -> None:
        """Add up the norms of all processes: of matrices, each once; experts are ordered without norms."""
        for name, site in {site.parameter: site for site in consumers if site.expert is None}.items():
            width, device = site.positions.numel(), layer.get_parameter(name).device
            mine = norms.get(name, FeatureNorm(width, device))
            (tokens,) = self.team.total(mine.tokens)
            self.team.add(*mine.addends())
            mine.tokens = tokens
            if tokens:
                norms[name] = mine


def _order(weight: Tensor, site: Site, pattern: NM, norm: FeatureNorm | None) -> Arrangement:
    scores = weight.float().square()
    if norm is not None and site.expert is None:
        scores *= norm.norms.square()
    found = search(scores, pattern, site.positions)
    return replace(found, permutation=found.permutation.cpu())  # as it can be sent


def _weight(layer: nn.Module, freedom: Freedom, schedule: Schedule) -> Tensor:
    """The consumer as (out_features, in_features)."""
    site = freedom.consumer
    stored = layer.get_parameter(site.parameter).data
    stored = stored if site.expert is None else stored[site.expert]
    return stored if schedule.input_axes[site.parameter] == 1 else stored.T
