"""Small pruning problems: weights, correlated inputs and their statistics, and how much an output suffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmprune.methods import Method
from llmprune.sparsity.statistics import FeatureNorm, Hessian, Statistic

__all__ = ["CPU", "hessian_of", "inputs_like_a_models", "norms_of", "output_error", "random_weight", "statistic_for"]

CPU = torch.device("cpu")


def random_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """(out_features, in_features) float32."""
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def inputs_like_a_models(tokens: int, in_features: int, seed: int = 0) -> Tensor:
    """(tokens, in_features) float32: features of different sizes that share part of what they say."""
    made = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, max(1, in_features // 4), generator=made)
    shared = common @ torch.randn(common.shape[1], in_features, generator=made) / math.sqrt(common.shape[1])
    sizes = torch.rand(in_features, generator=made) * 3 + 0.2
    return (shared + 0.5 * torch.randn(tokens, in_features, generator=made)) * sizes


def hessian_of(inputs: Tensor) -> Hessian:
    """The statistic that SparseGPT wants."""
    hessian = Hessian(inputs.shape[1], CPU)
    hessian.update(inputs)
    return hessian


def norms_of(inputs: Tensor) -> FeatureNorm:
    """The statistic that Wanda wants."""
    norms = FeatureNorm(inputs.shape[1], CPU)
    norms.update(inputs)
    return norms


def statistic_for(method: Method, inputs: Tensor) -> Statistic | None:
    """Whatever `method` wants."""
    if method.statistic is None:
        return None
    return hessian_of(inputs) if method.statistic is Hessian else norms_of(inputs)


def output_error(inputs: Tensor, before: Tensor, after: Tensor) -> float:
    """‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² in float64."""
    inputs, before, after = inputs.double(), before.double(), after.double()
    return float((inputs @ (before - after).T).square().sum() / (inputs @ before.T).square().sum())
