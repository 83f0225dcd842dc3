"""Divergence from the dense model against its definition in float64, and what is kept of a model that is gone."""

from __future__ import annotations

import errno
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.data import Corpus
from llmprune.errors import NumericError, UserError
from llmprune.eval.divergence import DensePass
from llmprune.eval.losses import memory_named, window_losses
from llmprune.eval.measure import Measures, Wanted
from llmprune.eval.perplexity import evaluate
from tests.builders import tiny_tokenizer
from tests.eval.small_models import MODELS, VOCABULARY, pruned, random_windows

POSITION = 4 * VOCABULARY  # bytes of logits


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def log_chances(model: Any, windows: Tensor) -> Tensor:
    """(n, L − 1, vocabulary): what the model expects, in float64."""
    with torch.no_grad():
        logits: Tensor = model.double()(input_ids=windows, use_cache=False).logits[:, :-1]
    model.float()
    return logits.log_softmax(-1)


@pytest.mark.parametrize("memory", [2**28, 50 * POSITION, 7 * POSITION, 1])
def test_divergence_is_what_its_definition_gives_in_float64(model: Any, memory: int) -> None:
    windows, other, dense = random_windows(), pruned(model), DensePass(memory)
    assert dense.record(model, windows, logits_memory=memory) == window_losses(model, windows, logits_memory=memory)
    losses, far = dense.compare(other, windows, logits_memory=memory)
    p, q = log_chances(model, windows), log_chances(other, windows)
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean(-1)
    assert losses == pytest.approx(window_losses(other, windows), rel=1e-5)
    assert far.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert far.kl_standard_error == pytest.approx(float(kl.std()) / math.sqrt(5), rel=1e-3)
    assert far.top1_agreement == pytest.approx(float(same.mean()))
    assert far.top1_standard_error == pytest.approx(float(same.std()) / math.sqrt(5))
    assert far.tokens == 5 * 23
    assert far.kl > 0.05  # or all of the above says nothing
    assert 0 < far.top1_agreement < 1


def test_a_model_does_not_diverge_from_itself(model: Any) -> None:
    dense = DensePass()
    dense.record(model, random_windows())
    _, far = dense.compare(model, random_windows(), logits_memory=30 * POSITION)
    assert far.kl == pytest.approx(0, abs=1e-6)
    assert far.top1_agreement == 1


def test_the_dense_model_may_be_gone() -> None:
    """In a job the pruned model is the dense one, changed in place."""
    model = MODELS["llama"]()
    other, dense, windows = pruned(model), DensePass(), random_windows()
    dense.record(model, windows)
    expected = dense.compare(other, windows)
    for parameter, changed in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(changed.data)
    assert dense.compare(model, windows) == expected


class Masked(torch.nn.Linear):
    """A head that never says some tokens, as heads do whose vocabulary was padded."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states).index_fill(-1, torch.tensor([0, 1]), -math.inf)


def masked(model: Any) -> Any:
    head = Masked(32, VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def test_tokens_that_the_dense_model_never_says_count_nothing() -> None:
    dense, windows = DensePass(), random_windows().clamp_min(2)
    other = masked(pruned(MODELS["llama"]()))
    dense.record(masked(MODELS["llama"]()), windows)
    _, far = dense.compare(other, windows)
    p, q = log_chances(masked(MODELS["llama"]()), windows)[..., 2:], log_chances(other, windows)[..., 2:]
    assert far.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    _, itself = dense.compare(masked(MODELS["llama"]()), windows)
    assert itself.kl == pytest.approx(0, abs=1e-6)


def test_a_divergence_that_is_no_number_is_refused() -> None:
    dense, windows = DensePass(), random_windows().clamp_min(2)
    dense.record(MODELS["llama"](), windows)
    other = MODELS["llama"]()
    other.lm_head.forward = masked(MODELS["llama"]()).lm_head.forward  # rules out what the dense model does not
    with pytest.raises(NumericError, match=r"window 1 of 5: .* is inf"):
        dense.compare(other, windows)


def test_both_sets_of_logits_keep_within_memory_and_the_decoder_runs_once() -> None:
    model = MODELS["llama"]()
    other, dense, windows = pruned(model), DensePass(), random_windows()
    dense.record(model, windows)
    sizes: list[int] = []
    runs: list[None] = []
    other.model.layers[0].register_forward_hook(lambda *_: runs.append(None))
    other.lm_head.register_forward_hook(lambda _, __, logits: sizes.append(POSITION * logits.shape[1]))
    dense.compare(other, windows, logits_memory=20 * POSITION)
    assert 2 * max(sizes) == 20 * POSITION
    assert len(sizes) == 2 * 5 * 3  # ten of 23 positions at a time, of both models
    assert len(runs) == 5
    assert "forward" not in vars(other.lm_head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_own_states(dtype: torch.dtype) -> None:
    model = MODELS["gemma2"]().to(dtype)
    dense, windows = DensePass(), random_windows()
    dense.record(model, windows)
    assert dense.compare(model, windows)[1].kl == pytest.approx(0, abs=1e-6)


def test_a_dense_head_in_another_dtype_is_used_as_it_is() -> None:
    model = MODELS["llama"]()
    dense, windows = DensePass(), random_windows()
    dense.record(model, windows)
    _, far = dense.compare(pruned(model).to(torch.bfloat16), windows)
    exact = dense.compare(pruned(model), windows)[1]
    assert far.kl == pytest.approx(exact.kl, rel=0.02)


def test_what_the_model_does_after_its_head_must_be_the_same() -> None:
    model, windows, dense = MODELS["gemma2"](), random_windows(), DensePass()
    dense.record(model, windows)
    other = pruned(model)
    other.config.final_logit_softcapping = 1.0
    with pytest.raises(UserError, match="makes something else of its head's output"):
        dense.compare(other, windows)


def test_other_tokens_are_refused() -> None:
    model, dense = MODELS["llama"](), DensePass()
    dense.record(model, random_windows())
    with pytest.raises(UserError, match="needs the same tokens"):
        dense.compare(model, random_windows(4))


def test_another_vocabulary_is_refused() -> None:
    model, dense = MODELS["llama"](), DensePass()
    dense.record(model, random_windows())
    model.resize_token_embeddings(70)
    with pytest.raises(UserError, match="64 tokens in its vocabulary and this one 70"):
        dense.compare(model, random_windows())


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    dense = DensePass(1)
    monkeypatch.setattr(dense._file, "write", full)
    with pytest.raises(UserError, match=r"folder for temporary files: No space left on device\. .*TMPDIR"):
        dense.record(MODELS["llama"](), random_windows())


TEXT = Corpus(["the quick brown fox jumps over the lazy dog. " * 4, "a second row, " * 5], "two rows", {"rows": 2})


def test_a_model_without_a_head_is_measured_all_the_same_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    measures = Measures(Wanted([TEXT], seq_len=20))
    [dense] = measures.dense(model, tiny_tokenizer()).rows
    found = measures.against(model, tiny_tokenizer())
    [row] = found.plain_rows()
    assert row["value"] == dense.value
    assert row["divergence"] is None
    assert found.notes == ("the divergence from the dense model was not measured: the model has no head of its own",)


def test_a_perplexity_has_its_divergence_beside_it() -> None:
    model, dense = MODELS["llama"](), DensePass()
    first = evaluate(model, tiny_tokenizer(), TEXT, seq_len=20, record=dense)
    row = evaluate(pruned(model), tiny_tokenizer(), TEXT, seq_len=20, against=dense)
    assert first.divergence is None
    assert row.divergence is not None
    assert row.divergence.tokens == row.tokens
    alone = evaluate(pruned(model), tiny_tokenizer(), TEXT, seq_len=20)
    assert row.value == pytest.approx(alone.value, rel=1e-6)
    assert set(row.versions) == {"llmprune", "torch", "transformers"}


@pytest.mark.parametrize(
    ("written", "size"), [("256MiB", 2**28), ("1 GB", 10**9), ("2k", 0), ("5000", 5000), ("1.5kB", 1500)]
)
def test_memory_is_written_with_a_unit(written: str, size: int) -> None:
    if size:
        assert memory_named(written) == size
        return
    with pytest.raises(UserError, match=f"such as 256MB or 1GiB; got '{written}'"):
        memory_named(written)
