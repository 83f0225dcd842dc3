"""Before a layer is walked, its free inner features change places, so that N:M keeps more of what matters.

What the layer computes stays the same; only the order in which it is stored changes, and with it which inputs share a
group. The norms that the choice goes by are taken from the dense layer on a few windows: it must be made before the
first weight of the layer is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmprune.distributed import Team
from llmprune.model.freedom import Freedom, Known, Site, apply, find_freedoms
from llmprune.sparsity.pattern import NM
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
    pattern : whose groups the features stand in
    team : rank 0 chooses, on the windows of all, and all do the same
    """

    def __init__(self, proof: Recording, pattern: NM, team: Team | None = None) -> None:
        self.proof, self.pattern, self.team = proof, pattern, team or Team()
        self.known: Known = {}

    def permute(
        self,
        layer: nn.Module,
        index: int,
        schedule: Schedule,
        *,
        hidden: Sequence[Tensor],
        call: Callable[[nn.Module, Tensor, int], Tensor],
    ) -> set[str]:
        """Change places in a layer that is still dense.

        hidden, call : the layer's inputs, one batch each, and how it is called with one of them: (layer, states,
            batch); of all batches, those among the first `WINDOWS` that are this process's

        Returns
        -------
        names of the parameters that changed
        """
        window = self.proof.hidden[0]
        freedoms = self.team.decided(
            lambda: find_freedoms(
                layer, lambda copied: self.proof.calls[index][0](copied, window), schedule.input_axes, self.known
            )
        )
        self.proof.calls[index] = []
        norms = self._norms(layer, freedoms, hidden=hidden, call=call)
        changed: set[str] = set()
        for freedom in freedoms:
            found = self.team.decided(lambda chosen=freedom: self._order(layer, chosen, schedule, norms))  # type: ignore[misc]
            if found.dropped < found.dropped_before:
                apply(layer, freedom, found.permutation)
                changed |= {site.parameter for site in (freedom.consumer, *freedom.producers)}
        return changed

    def _order(
        self, layer: nn.Module, freedom: Freedom, schedule: Schedule, norms: dict[str, FeatureNorm]
    ) -> Arrangement:
        scores = _weight(layer, freedom, schedule).float().square()
        if (norm := norms.get(freedom.consumer.parameter)) is not None and freedom.consumer.expert is None:
            scores *= norm.norms.square()
        found = search(scores, self.pattern, freedom.consumer.positions)
        return replace(found, permutation=found.permutation.cpu())  # as it can be sent

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


def _weight(layer: nn.Module, freedom: Freedom, schedule: Schedule) -> Tensor:
    """The consumer as (out_features, in_features)."""
    site = freedom.consumer
    stored = layer.get_parameter(site.parameter).data
    stored = stored if site.expert is None else stored[site.expert]
    return stored if schedule.input_axes[site.parameter] == 1 else stored.T
