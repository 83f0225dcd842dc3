"""Windows of token ids: calibration's are seeded, evaluation's are the papers'."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llmprune.data import Corpus, bos_token, calibration_windows, evaluation_windows, load_corpus
from llmprune.errors import UserError
from tests.builders import tiny_tokenizer


def test_bos_is_put_first_only_where_a_model_needs_it() -> None:
    tokenizer = tiny_tokenizer()
    assert bos_token("auto", tokenizer, "llama") is None
    assert bos_token("auto", tokenizer, "gemma3_text") == 1
    assert bos_token("always", tokenizer, "llama") == 1
    assert bos_token("never", tokenizer, "gemma2") is None


def test_bos_that_is_not_there_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no BOS token, and --bos always asks for one"):
        bos_token("always", tokenizer, "llama")
    with pytest.raises(UserError, match="no BOS token, and gemma models need one"):
        bos_token("auto", tokenizer, "gemma")
    with pytest.raises(UserError, match="--bos is one of auto, always, never; got 'yes'"):
        bos_token("yes", tokenizer, "llama")  # type: ignore[arg-type]


def letters(count: int, seed: int = 0) -> str:
    """Random letters: any twenty of them in a row occur once."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=count))


def spelled(windows: torch.Tensor) -> list[str]:
    """Windows of the tiny tokenizer, which has one token a character, as text."""
    symbols = {index: symbol for symbol, index in tiny_tokenizer().get_vocab().items()}
    return ["".join(symbols[int(token)] for token in window) for window in windows]


def calibrate(corpus: Any, tokenizer: Any = None, **options: Any) -> torch.Tensor:
    settings = {"num_samples": 4, "seq_len": 20, "seed": 0, "bos": None, **options}
    return calibration_windows(corpus, tokenizer or tiny_tokenizer(), **settings)


def test_documents_are_shuffled_and_packed_end_to_end() -> None:
    documents = [letter * 8 for letter in "abcdefgh"]
    windows = calibrate(Corpus(["", *documents, " \n"], "eight"), num_samples=4, seq_len=20)
    assert windows.shape == (4, 20)
    assert windows.dtype == torch.int64
    stream = "".join(spelled(windows))  # 8 documents of 8 letters and two newlines fill 4 windows exactly
    assert sorted(stream.split("\n\n")[:-1]) == documents
    assert stream.split("\n\n")[:-1] != documents


def test_the_seed_decides_and_nothing_else_does() -> None:
    corpus = Corpus([letters(30, seed) for seed in range(40)], "forty")
    first = calibrate(corpus, seed=1)
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(first, calibrate(corpus, seed=1))
    assert not torch.equal(first, calibrate(corpus, seed=2))


def test_windows_of_one_long_document_are_seeded_and_do_not_overlap() -> None:
    text = letters(400)
    found = []
    for seed in range(5):
        windows = spelled(calibrate(Corpus([text], "long"), seed=seed))
        starts = [text.find(window) for window in windows]
        assert min(starts) >= 0
        assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(starts))
        found.append(tuple(starts))
    assert len(set(found)) == 5
    assert max(max(starts) for starts in found) > 250  # the whole document is drawn from, not its beginning


def test_calibration_windows_begin_with_bos_where_asked() -> None:
    corpus = Corpus([letters(60), letters(60, 1)], "two")
    windows = calibrate(corpus, tiny_tokenizer(adds_bos=True), bos=1)
    assert (windows[:, 0] == 1).all()
    assert not (windows[:, 1:] == 1).any()
    assert not (calibrate(corpus, tiny_tokenizer(adds_bos=True)) == 1).any()  # no special tokens inside either


def test_a_bos_that_the_chat_template_wrote_is_not_doubled() -> None:
    corpus = Corpus(["<s>" + letters(38)], "chat")  # 40 tokens with the newlines, and that BOS
    windows = [calibrate(corpus, num_samples=2, seq_len=21, bos=1, seed=seed) for seed in range(4)]
    assert [int((some == 1).sum()) for some in windows] == [2] * 4


def test_too_little_text_says_how_much_is_missing() -> None:
    with pytest.raises(UserError, match=r"holds 52 tokens, and 4 .* windows of 20 need 80: 28 are missing\. Lower"):
        calibrate(Corpus([letters(50)], "short"))
    with pytest.raises(UserError, match="holds 0 tokens"):
        calibrate(Corpus([" "], "blank"))


def test_exactly_enough_text_is_enough() -> None:
    assert calibrate(Corpus([letters(78)], "just")).shape == (4, 20)


def evaluate_on(corpus: Any, tokenizer: Any = None, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"seq_len": 10, "tokens": None, "bos": None, **options}
    return evaluation_windows(corpus, tokenizer or tiny_tokenizer(), **settings)


def test_evaluation_text_is_joined_and_cut_without_overlap() -> None:
    windows = evaluate_on(Corpus(["abcdef", "", "ghij"], "three"), seq_len=6)
    assert spelled(windows) == ["abcdef", "\n\n\n\ngh"]  # "ij" would be a partial window


def test_the_tokenizers_bos_stands_at_the_very_start_only() -> None:
    windows = evaluate_on(Corpus([letters(50)], "t"), tiny_tokenizer(adds_bos=True))
    assert windows.shape == (5, 10)
    assert (windows == 1).nonzero().tolist() == [[0, 0]]


def test_bos_windows_hold_one_text_token_less() -> None:
    text = letters(50)
    windows = evaluate_on(Corpus([text], "t"), tiny_tokenizer(adds_bos=True), bos=1)
    assert windows.shape == (5, 10)
    assert (windows[:, 0] == 1).all()
    assert "".join(spelled(windows[:, 1:])) == text[:45]


def test_bos_windows_hold_no_other_special_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    corpus = Corpus([letters(44)], "t")
    assert evaluate_on(corpus, tokenizer, bos=1).shape == (4, 10)  # the end token would have filled a fifth


@pytest.mark.parametrize(("tokens", "count"), [(None, 5), (35, 3), (30, 3), (29, 2), (1, 1), (999, 5)])
def test_tokens_bound_the_windows(tokens: int | None, count: int) -> None:
    corpus = Corpus([letters(50)], "t")
    windows = evaluate_on(corpus, tokens=tokens)
    assert windows.shape == (count, 10)
    assert torch.equal(windows, evaluate_on(corpus)[:count])


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match="t holds 9 tokens, too few for one evaluation window of 10"):
        evaluate_on(Corpus([letters(9)], "t"))


def test_long_texts_raise_no_warning_of_the_tokenizers(transformers_log: pytest.LogCaptureFixture) -> None:
    tiny_tokenizer()(letters(100))
    assert "longer than the specified maximum" in transformers_log.text  # the warning is real ...
    transformers_log.clear()
    evaluate_on(Corpus([letters(100)], "t"))  # ... and not ours
    calibrate(Corpus([letters(100)], "t"))
    assert not transformers_log.text


def test_token_ids_are_taken_as_they_are() -> None:
    ids = torch.arange(60, dtype=torch.int32).view(6, 10)
    assert torch.equal(calibrate(ids, num_samples=4, seq_len=10), ids[:4].long())
    assert torch.equal(evaluate_on(ids), ids.long())
    assert torch.equal(evaluate_on(ids, tokens=25), ids[:2].long())
    assert calibrate(ids, num_samples=4, seq_len=10).dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(6, 20), "integer tensor of shape .4 or more, 20.; got dtype torch.float32"),
        (torch.zeros(6, 20, dtype=torch.bool), "got dtype torch.bool"),
        (torch.zeros(6, 21, dtype=torch.int64), r"got \(6, 21\)"),
        (torch.zeros(3, 20, dtype=torch.int64), r"got \(3, 20\)"),
        (torch.zeros(80, dtype=torch.int64), r"got \(80,\)"),
        (torch.full((6, 20), -100), "without negative values; got -100"),
    ],
)
def test_token_ids_that_do_not_fit_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(ids)


def test_token_ids_must_bring_the_bos_that_is_asked_for() -> None:
    ids = torch.full((4, 20), 7)
    ids[0, 0] = 1
    with pytest.raises(UserError, match="begin with the BOS token 1 and 3 of 4 do not"):
        calibrate(ids, bos=1)


@pytest.mark.parametrize("setting", [{"num_samples": 0}, {"seq_len": 1}])
def test_sizes_must_make_sense(setting: dict[str, int]) -> None:
    [name] = setting
    with pytest.raises(UserError, match=f"{name} must be"):
        calibrate(Corpus([letters(99)], "t"), **setting)


@pytest.mark.real
def test_the_papers_text_is_read_byte_for_byte(shared: Path) -> None:
    corpus = load_corpus(shared / "data" / "wikitext2" / "test.jsonl", purpose="evaluation")
    assert corpus.provenance["rows"] == 4358
    assert corpus.provenance["sha256"].startswith("696cca6b65a171b0")
    assert len("\n\n".join(corpus.texts).encode()) == 1_296_370
    windows = evaluate_on(corpus, seq_len=2048)  # one token a character
    assert len(windows) == len("\n\n".join(corpus.texts)) // 2048


@pytest.mark.real
def test_c4_documents_fill_calibration_windows(shared: Path) -> None:
    corpus = load_corpus(shared / "data" / "c4" / "c4_en_full_200.jsonl", purpose="calibration")
    assert len(corpus.texts) == 200
    windows = [calibrate(corpus, num_samples=32, seq_len=512, seed=seed) for seed in (0, 1)]
    assert not torch.equal(*windows)
