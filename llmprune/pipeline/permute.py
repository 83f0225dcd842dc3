"""Before a layer is walked, its free inner features change places, so that N:M keeps more of what matters.

What the layer computes stays the same; only the order in which it is stored changes, and with it which inputs share a
group. The norms that the choice goes by are taken from the dense layer on a few windows: it must be made before the
first weight of the layer is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmprune.model.freedom import Freedom, Known, apply, find_freedoms
from llmprune.sparsity.pattern import NM
from llmprune.sparsity.permutation import search
from llmprune.sparsity.statistics import FeatureNorm
from llmprune.walk.products import Product, Products
from llmprune.walk.recorder import Recording
from llmprune.walk.survey import Schedule

__all__ = ["Permuter"]

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
    """

    def __init__(self, proof: Recording, pattern: NM) -> None:
        self.proof, self.pattern = proof, pattern
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

        hidden, call : the layer's inputs, one batch each, and how it is called with one of them: (layer, states, batch)

        Returns
        -------
        names of the parameters that changed
        """
        window = self.proof.hidden[0]
        freedoms = find_freedoms(
            layer, lambda copied: self.proof.calls[index][0](copied, window), schedule.input_axes, self.known
        )
        self.proof.calls[index] = []
        norms = self._norms(layer, freedoms, hidden=hidden[:WINDOWS], call=call)
        changed: set[str] = set()
        for freedom in freedoms:
            scores = _weight(layer, freedom, schedule).float().square()
            if (norm := norms.get(freedom.consumer.parameter)) is not None and freedom.consumer.expert is None:
                scores *= norm.norms.square()
            found = search(scores, self.pattern, freedom.consumer.positions)
            if found.dropped < found.dropped_before:
                apply(layer, freedom, found.permutation)
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

        consumers = {freedom.consumer.parameter for freedom in freedoms}
        with torch.no_grad(), Products([(name, layer.get_parameter(name)) for name in consumers], meet):
            for batch, states in enumerate(hidden if consumers else ()):
                call(layer, states, batch)
        return norms


def _weight(layer: nn.Module, freedom: Freedom, schedule: Schedule) -> Tensor:
    """The consumer as (out_features, in_features)."""
    site = freedom.consumer
    stored = layer.get_parameter(site.parameter).data
    stored = stored if site.expert is None else stored[site.expert]
    return stored if schedule.input_axes[site.parameter] == 1 else stored.T
