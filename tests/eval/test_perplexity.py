"""Perplexity against plain float64 arithmetic, and the protocol that goes with the number."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmprune.data import Corpus
from llmprune.errors import NumericError, UserError
from llmprune.eval.losses import window_losses
from llmprune.eval.perplexity import default_seq_len, evaluate, main, perplexity
from tests.builders import tiny_model, tiny_tokenizer
from tests.eval.small_models import MODELS, VOCABULARY, random_windows, tiny_gemma2


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def float64_means(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """The definition, written out: every window alone, all in float64."""
    exact = copy.deepcopy(model).double()
    means = []
    with torch.no_grad():
        for window in windows:
            logits = exact(input_ids=window[None], use_cache=False).logits[0].double()
            chances = torch.softmax(logits, dim=-1)
            terms = [-math.log(chances[place, window[place + 1]]) for place in range(len(window) - 1)]
            means.append(sum(terms) / len(terms))
    return torch.tensor(means, dtype=torch.float64)


def test_value_and_error_agree_with_float64(model: Any) -> None:
    windows = random_windows()
    means = float64_means(model, windows)
    value, standard_error, seconds = perplexity(model, windows)
    assert value == pytest.approx(math.exp(means.mean()), rel=1e-5)
    assert standard_error == pytest.approx(float(means.mean().exp() * means.std()) / math.sqrt(5), rel=1e-4)
    assert seconds > 0
    assert means.std() > 0.05  # windows differ, or the test above says nothing


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 99])
def test_the_batch_does_not_matter(model: Any, batch_size: int) -> None:
    windows = random_windows()
    alone = window_losses(model, windows, batch_size=1)
    assert window_losses(model, windows, batch_size=batch_size) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("positions", [1, 5, 22, 23, 24])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_head_in_chunks_gives_the_same(model: Any, positions: int, batch_size: int | None) -> None:
    windows = random_windows()
    memory = positions * VOCABULARY * 4 * (batch_size or 1)
    chunked = window_losses(model, windows, batch_size=batch_size, logits_memory=memory)
    assert chunked == pytest.approx(window_losses(model, windows), rel=1e-5)


@pytest.mark.parametrize(("batch_size", "batches", "chunks"), [(None, 5, 5 * 3), (2, 3, 5 + 5 + 3)])
def test_chunks_keep_within_memory_and_run_the_decoder_once(
    model: Any, batch_size: int | None, batches: int, chunks: int
) -> None:
    sizes: list[int] = []
    runs: list[None] = []
    decoder = model.base_model
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    layers[0].register_forward_hook(lambda *_: runs.append(None))
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: sizes.append(4 * logits.numel()))
    memory = 10 * VOCABULARY * 4
    window_losses(model, random_windows(), batch_size=batch_size, logits_memory=memory)
    assert max(sizes) == memory
    assert len(sizes) == chunks  # 23 predictions, ten at a time, or five of two windows each
    assert len(runs) == batches
    assert "forward" not in vars(decoder)


def test_windows_are_batched_by_the_memory_of_their_logits() -> None:
    model = MODELS["llama"]()
    batches: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: batches.append(len(logits)))
    window_losses(model, random_windows(5, 24), logits_memory=2 * 24 * VOCABULARY * 4)
    assert batches == [2, 2, 1]


def test_a_model_that_gives_all_logits_or_none_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    windows = random_windows()
    expected = window_losses(model, windows)
    forward = model.forward

    def old_forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setitem(vars(model), "forward", old_forward)
    assert window_losses(model, windows, logits_memory=1) == pytest.approx(expected, rel=1e-5)


def test_a_patched_decoder_keeps_its_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate, too, moves weights by a `forward` of the instance's own."""
    model = MODELS["llama"]()
    calls: list[None] = []
    own = model.base_model.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return own(*args, **kwargs)

    monkeypatch.setitem(vars(model.base_model), "forward", patched)
    window_losses(model, random_windows(), logits_memory=1)
    assert len(calls) == 5
    assert vars(model.base_model)["forward"] is patched


def test_modes_are_restored_and_dropout_is_off() -> None:
    model: Any = tiny_model("gpt2")
    expected, *_ = perplexity(model, random_windows())
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    value, *_ = perplexity(model, random_windows())
    assert value == expected
    assert [module.training for module in model.modules()] == before
    assert not any(parameter.requires_grad is False for parameter in model.parameters())


def test_knowing_nothing_is_a_perplexity_of_the_vocabulary() -> None:
    model: Any = tiny_model("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    value, standard_error, _ = perplexity(model, random_windows())
    assert value == pytest.approx(VOCABULARY, rel=1e-6)
    assert standard_error == pytest.approx(0, abs=1e-6)


def test_one_window_has_no_error_bar() -> None:
    model, tokenizer = MODELS["llama"](), tiny_tokenizer()
    assert perplexity(model, random_windows(1))[1] is None
    assert str(evaluate(model, tokenizer, random_windows(1))).endswith("± n/a")


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    perplexity(tiny_model("llama"), random_windows(), batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_bfloat16_logits_are_summed_in_float32() -> None:
    model = MODELS["llama"]().to(torch.bfloat16)
    windows = random_windows()
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].double()
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    assert window_losses(model, windows) == pytest.approx(exact.view(5, 23).mean(dim=1).tolist(), rel=1e-6)


@pytest.mark.parametrize("logits_memory", [2**20, 1])
def test_a_loss_that_is_no_number_names_its_window(logits_memory: int) -> None:
    model: Any = tiny_model("llama")
    windows = random_windows().clamp(max=62)
    windows[2, 5] = 63
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = math.nan
    with pytest.raises(NumericError, match="window 3 of 5: the cross-entropy is nan"):
        perplexity(model, windows, logits_memory=logits_memory)


def test_a_perplexity_beyond_floats_is_refused() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    with pytest.raises(NumericError, match="beyond a float"):
        perplexity(model, random_windows())


@pytest.mark.parametrize("windows", [torch.zeros(0, 8).long(), torch.zeros(3, 1).long(), torch.zeros(8).long()])
def test_windows_must_be_windows(windows: torch.Tensor) -> None:
    with pytest.raises(UserError, match="needs windows of shape"):
        perplexity(tiny_model("llama"), windows)
    with pytest.raises(UserError, match="--batch-size must be 1 or more"):
        perplexity(tiny_model("llama"), random_windows(), batch_size=0)


# ---------------------------------------------------------------------------------------------------------- protocol

TEXT = Corpus(["the quick brown fox jumps over the lazy dog. " * 4, "a second row, " * 5], "two rows", {"rows": 2})


def test_evaluate_says_what_it_measured() -> None:
    model, tokenizer = MODELS["llama"](), tiny_tokenizer(adds_bos=True)
    result = evaluate(model, tokenizer, TEXT, seq_len=20)
    joined = "\n\n".join(TEXT.texts)
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"])
    windows = ids[: len(ids) // 20 * 20].view(-1, 20)
    assert result.value == pytest.approx(math.exp(float64_means(model, windows).mean()), rel=1e-5)
    assert (result.windows, result.tokens, result.seq_len) == (len(windows), len(windows) * 19, 20)
    assert (result.bos, result.dtype, result.dataset, result.provenance) == (False, "float32", "two rows", {"rows": 2})
    for part in ("two newlines", "tokenised once", f"{len(windows)} windows of 20", "no BOS but", "float32 model"):
        assert part in result.protocol
    assert json.loads(json.dumps(asdict(result))) == asdict(result)


def test_evaluate_with_bos_in_every_window() -> None:
    model, tokenizer = MODELS["llama"](), tiny_tokenizer(adds_bos=True)
    result = evaluate(model, tokenizer, TEXT, seq_len=20, bos="always")
    ids = torch.tensor(tokenizer("\n\n".join(TEXT.texts), verbose=False, add_special_tokens=False)["input_ids"])
    text = ids[: len(ids) // 19 * 19].view(-1, 19)
    windows = torch.cat([torch.ones(len(text), 1).long(), text], dim=1)
    assert result.value == pytest.approx(math.exp(float64_means(model, windows).mean()), rel=1e-5)
    assert result.bos
    assert "BOS first in every window" in result.protocol


def test_gemma_gets_its_bos_by_itself() -> None:
    assert evaluate(tiny_gemma2(), tiny_tokenizer(), TEXT, seq_len=20).bos


def test_evaluate_reads_what_load_corpus_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": row}) + "\n" for row in TEXT.texts), encoding="utf-8")
    model, tokenizer = MODELS["llama"](), tiny_tokenizer()
    result = evaluate(model, tokenizer, str(path), seq_len=20, tokens=70, text_column="body")
    assert result.windows == 3
    assert result.dataset == "a.jsonl"
    same = evaluate(model, tokenizer, TEXT, seq_len=20, tokens=70)
    assert (result.value, result.standard_error) == (same.value, same.standard_error)


def test_reading_stops_when_the_tokens_asked_for_are_there() -> None:
    rows = ["abcdefghij"] * 1000
    result = evaluate(MODELS["llama"](), tiny_tokenizer(), rows, seq_len=20, tokens=40)
    assert result.windows == 2
    assert result.provenance["rows"] == 128  # 40 tokens at 32 characters


def test_token_ids_bring_their_own_length() -> None:
    windows = random_windows(4, 12)
    result = evaluate(MODELS["llama"](), tiny_tokenizer(), windows)
    assert (result.seq_len, result.windows, result.tokens) == (12, 4, 44)
    assert result.protocol.startswith("token ids as given; 4 windows of 12")
    assert result.provenance["rows"] == 4


def test_windows_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(UserError, match="--seq-len may be at most 64 for this model; got 65"):
        evaluate(tiny_model("gpt2"), tiny_tokenizer(), TEXT, seq_len=65)


def test_the_default_window_is_the_papers_or_the_models() -> None:
    assert default_seq_len(transformers.GPT2Config(n_positions=1024)) == 1024
    assert default_seq_len(transformers.LlamaConfig(max_position_embeddings=8192)) == 2048
    assert default_seq_len(transformers.BloomConfig()) == 2048  # ALiBi: no limit in its config


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    MODELS["llama"]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT.texts), encoding="utf-8")
    return str(tmp_path / "model")


def run_main(checkpoint: str, *options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["--model", checkpoint, "--dataset", str(Path(checkpoint).parent / "text.txt"), "--device=cpu", *options])
    return int(end.value.code or 0)


def test_the_command_line_prints_value_error_and_protocol(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = evaluate(MODELS["llama"](), tiny_tokenizer(), TEXT, seq_len=20)
    assert run_main(checkpoint, "--seq-len=20") == 0
    value, tokens, protocol = capsys.readouterr().out.splitlines()
    assert value == f"perplexity  {expected}"
    assert f"{expected.tokens} predicted in {expected.windows} windows" in tokens
    assert "tokenised once" in protocol


def test_the_command_line_speaks_json(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(checkpoint, "--seq-len=20", "--tokens=40", "--bos=always", "--dtype=bfloat16", "--json") == 0
    [result] = json.loads(capsys.readouterr().out)["rows"]
    assert (result["windows"], result["bos"], result["dtype"]) == (2, True, "bfloat16")


@pytest.mark.parametrize(
    ("option", "message"), [("--seq-len=999", "at most 64"), ("--device=nowhere", "--device nowhere cannot be used")]
)
def test_the_command_line_turns_errors_into_a_sentence(
    checkpoint: str, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    assert run_main(checkpoint, option) == 2
    output = capsys.readouterr()
    assert output.err.startswith("Error: ")
    assert message in output.err
    assert "Traceback" not in output.err
