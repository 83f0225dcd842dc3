"""The walk's oracle: true-sequential pruning the plain way, one full forward of the layer for every linear.

It knows `nn.Linear` and `Conv1D` modules only, and shares no code with the walk but the statistics and methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.config import PruneConfig
from llmprune.sparsity.statistics import Statistic

__all__ = ["prune_naively"]


def prune_naively(model: Any, windows: Tensor, config: PruneConfig) -> dict[str, Statistic]:
    """Prune in place, window by window, in the order of execution. Returns the statistic of every linear by name."""
    layers = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
    statistics: dict[str, Statistic] = {}
    for layer in layers:
        for name, module in _order(model, layer, windows[:1]):
            statistics[name] = _prune_one(model, module, windows, config)
    return statistics


def _order(model: Any, layer: nn.Module, ids: Tensor) -> list[tuple[str, nn.Module]]:
    """The linears of a layer, named as in the model, in the order in which a forward meets them."""
    names = {module: name for name, module in model.named_modules()}
    met: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, _a: met.append(m))
        for module in layer.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    _forward(model, ids)
    for hook in hooks:
        hook.remove()
    return [(names[module], module) for module in met]


def _prune_one(model: Any, module: Any, windows: Tensor, config: PruneConfig) -> Statistic:
    weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    method = config.build_method()
    assert method.statistic is not None
    statistic = method.statistic(weight.shape[1], torch.device("cpu"))
    hook = module.register_forward_pre_hook(lambda _m, args: statistic.update(args[0].reshape(-1, weight.shape[1])))
    for ids in windows:
        _forward(model, ids[None])
    hook.remove()
    weight.copy_(method.prune(weight.float(), statistic, config.pattern).weight)
    return statistic


def _forward(model: Callable[..., Any], ids: Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
