"""When a run writes its safe points, and how it goes on from one.

The weights of a model that rests on disk must leave memory, so each finished layer is written at once. A model in
memory writes what it has finished once a minute at most: a run of twenty seconds writes nothing, and one of twelve
hours can be continued although nobody had asked for it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import llmprune
from llmprune.checkpoint.partial import MASK, Partial
from llmprune.config import PruneConfig
from llmprune.job.stop import Stop, Stopped
from llmprune.model import Decoder
from llmprune.pipeline import FinishedLayer, Sink

__all__ = ["EVERY", "SafePoints", "run_fingerprint"]

EVERY = 60.0
"""Seconds between two safe points of a model in memory, at least."""


class SafePoints(Sink):
    """Writes finished layers into a `Partial`, and takes from it those of an earlier run.

    Parameters
    ----------
    partial : opened
    decoder : of the model that is pruned
    every : seconds between two safe points, at least; a model on a shelf has one after every layer
    stop : looked at after every layer
    """

    def __init__(self, partial: Partial, decoder: Decoder, *, every: float = EVERY, stop: Stop | None = None) -> None:
        self.partial, self.decoder, self.every, self.stop = partial, decoder, every, stop
        self._waiting: dict[int, tuple[nn.Module, FinishedLayer]] = {}
        self._began = self._last = time.monotonic()
        self._over = False

    @property
    def worthwhile(self) -> bool:
        """Whether so much was done that a safe point is worth waiting for, and there are layers still to come."""
        if self._over:
            return False
        return self.decoder.shelf is not None or bool(self.partial.layers) or self._age(self._began) >= self.every

    def earlier(self, index: int) -> FinishedLayer | None:
        """What an earlier run made of this layer."""
        saved = self.partial.layers.get(index)
        if saved is None or index in self._waiting:
            return None
        masks = {name[len(MASK) :]: tensor for name, tensor in self.partial.tensors(index) if name.startswith(MASK)}
        return FinishedLayer(saved.weights, saved.tuned, set(saved.adjusted), masks)

    def restore(self, index: int, layer: nn.Module) -> None:
        """Give the layer its final weights, and if it rests on a shelf, put them there. Raises Stopped if asked to."""
        self._leave_if_asked()
        prefix = self.decoder.prefixes[index]
        for name, tensor in self.partial.tensors(index):
            if not name.startswith(MASK):
                layer.get_parameter(name.removeprefix(prefix)).data.copy_(tensor)
        self._shelve(index)

    def finished(self, index: int, layer: nn.Module, done: FinishedLayer) -> None:
        """Take note of a layer, write it if it is time, and leave if somebody has asked for that.

        Raises
        ------
        Stopped
            saying where the safe point is.
        UserError
            if the disk is full.
        """
        self._waiting[index] = layer, done
        asked = self.stop is not None and self.stop.code is not None
        if self.decoder.shelf is not None or asked or self._age(self._last) >= self.every:
            self.flush()
        self._leave_if_asked()

    def all_finished(self) -> None:
        """Write what is left, so that the run can go on should saving fail. Later changes are none of a layer's own."""
        if self.worthwhile:
            self.flush()
        self._waiting.clear()
        self._over = True

    def flush(self) -> None:
        """Write what is finished and not written yet. Raises UserError if the disk is full."""
        if not self._waiting:
            return
        for index in list(self._waiting):
            layer, done = self._waiting[index]
            prefix = self.decoder.prefixes[index]
            tensors = {prefix + name: p.data for name, p in layer.named_parameters(remove_duplicate=False)}
            tensors |= {MASK + name: mask for name, mask in done.masks.items()}
            self.partial.write(index, tensors, weights=done.weights, tuned=done.tuned, adjusted=done.adjusted)
            del self._waiting[index]
            self._shelve(index)
        self.partial.commit()
        self._last = time.monotonic()

    def _leave_if_asked(self) -> None:
        if self.stop is not None and self.stop.code is not None:
            raise Stopped(self.stop.code)

    def _age(self, moment: float) -> float:
        return time.monotonic() - moment

    def _shelve(self, index: int) -> None:
        if self.decoder.shelf is not None:
            self.decoder.shelf.moved(self.decoder.prefixes[index].rstrip("."), self.partial.path(index))


def run_fingerprint(
    digests: Mapping[str, str], windows: Tensor, config: PruneConfig, device: torch.device, dtype: str
) -> dict[str, Any]:
    """All that decides the bits of the result: two runs with the same one may go on from each other's safe points.

    Parameters
    ----------
    digests : of the dense model's tensors, by name
    windows : calibration tokens (num_samples, seq_len)
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "model": _sha256(json.dumps(sorted(digests.items())).encode()),
        "calibration tokens": _sha256(windows.contiguous().numpy().tobytes()),
        "config": asdict(config),
        "dtype": dtype,
        "device": f"{device.type} {gpu}".strip(),
        "versions": {
            "llmprune": llmprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
