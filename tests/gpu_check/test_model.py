"""The model with random weights, dense and packed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gpu_check.fakes import case


def test_a_tiny_model_decodes_dense_and_packed(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.model, "NEW_TOKENS", 4)
    monkeypatch.setattr(gpu.model, "ROUNDS", 1)
    sizes = gpu.model.Sizes(2, 64, 128, 4, 2, 64)
    result = gpu.model.run_model(sizes, gpu.clock.Cpu(), seed=0, tuned=[], compile_too=lambda: False)
    assert result.packed_linears == 14
    [mode] = result.modes
    assert (mode.name, mode.failure, mode.same_tokens) == ("graph", None, 4)
    assert mode.ratio is not None
    assert 0.5625 < result.memory_ratio < 1
    dense = gpu.model.random_model(sizes, torch.device("cpu"), 0)
    decoder = gpu.model.Decoder(dense, compiled=False)
    for _ in range(3):
        decoder.step()
    # The same by transformers' own cache, which here begins with as many tokens whose keys and values are zero.
    assert int(decoder.position) == gpu.model.CONTEXT + 3
    assert float(decoder._cache.keys[1][0, 0, gpu.model.CONTEXT :, 0].abs().min(0).values) == 0  # the last is free
    assert (decoder._cache.keys[1][0, :, gpu.model.CONTEXT : gpu.model.CONTEXT + 3].abs().sum(-1) > 0).all()


def test_what_was_tuned_at_one_token_decides_the_models_path(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune.runtime import dispatch, timing
    from llmprune.runtime.weight import SparseWeight

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    timing.forget()
    packed = gpu.weights.Weight(case(gpu), torch.device("cpu")).packed
    weight = SparseWeight(packed, None)
    lucky = {"mma:a": 1.5, "mma:b": 2.0}  # a was fast in the search, and lost in the final
    tuned = [gpu.rows.Tuned(case(gpu), "mma", config="mma:b", microseconds=2.0, times=lucky)]
    tuned += [gpu.rows.Tuned(case(gpu), "gemv", config="gemv:a", microseconds=3.0, times={"gemv:a": 3.0})]
    tuned += [gpu.rows.Tuned(case(gpu), "expand_dot")]  # all of its settings failed
    tuned += [gpu.rows.Tuned(case(gpu, tokens=8), "mma", config="mma:c", microseconds=1.0, times={"mma:c": 1.0})]
    gpu.model.use_tuned(tuned, {(64, 128): weight})
    monkeypatch.setattr(dispatch, "has_kernel", lambda weight: True)
    assert dispatch.choose(weight, 1, ("kernel", "mma:a", "gemv:a", "mma:b", "mma:c", "dense")) == "mma:b"
    timing.forget()
