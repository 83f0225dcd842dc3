"""The model card: valid, complete, made from the report alone, and never over what a person wrote."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from llmprune.checkpoint.base_card import read_base_card
from llmprune.checkpoint.card import CARD, card_text, is_generated, refresh_card, write_card
from llmprune.checkpoint.card_facts import METHOD_TITLES, CardFacts, without_paths
from llmprune.checkpoint.report import Report
from llmprune.methods import METHODS
from llmprune.results import SkippedWeight
from tests.checkpoint.test_report import example

CONFIG = {
    "sparsity": "2:4",
    "method": "sparsegpt",
    "effort": None,
    "dataset": "c4",
    "num_samples": 128,
    "seq_len": 2048,
    "seed": 0,
}
SOURCE = {
    "id": "gpt2",
    "revision": "0" * 40,
    "calibration": {"name": "c4 train", "repo": "allenai/c4", "revision": "1" * 40},
    "card": {"base_model": "gpt2", "license": "mit", "language": ["en", "de"]},
}
DIVERGENCE = {
    "kl": 0.125,
    "kl_standard_error": 0.01,
    "top1_agreement": 0.75,
    "top1_standard_error": None,
    "tokens": 2047,
    "protocol": "KL as it is measured.",
}


def perplexity(value: float, divergence: dict[str, Any] | None = None) -> dict[str, Any]:
    file = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
    return {
        "kind": "perplexity",
        "dataset": "wikitext2 test",
        "value": value,
        "standard_error": 0.5,
        "tokens": 2047,
        "seq_len": 2048,
        "protocol": "wikitext2 test: as it is measured.",
        "provenance": {"repo": "Salesforce/wikitext", "revision": "2" * 40, "file": file},
        "divergence": divergence,
    }


def task(value: float) -> dict[str, Any]:
    row = {"kind": "zero_shot", "task": "piqa", "metric": "acc", "value": value, "standard_error": None}
    return {**row, "items": 100, "protocol": "piqa: zero-shot."}


@pytest.fixture(scope="module")
def report() -> Report:
    return replace(
        example("mixtral"),
        command="__main__.py --model gpt2 --output-dir=/data/ada/out --config ~/run.yaml",
        config=CONFIG,
        source=SOURCE,
        before=(perplexity(20.0), task(0.8)),
        after=(perplexity(25.0, DIVERGENCE), task(0.6)),
        generations=({"prompt": "One ``` day", "dense": "a | b\nc", "pruned": "d"},),
        seconds={"prune": 90.0},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    return tmp_path


def text_of(report: Report, directory: Path, name: str = "ada/m") -> str:
    return card_text(CardFacts(report, directory, name))


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_front_matter_is_what_the_hub_knows(report: Report, saved: Path) -> None:
    data = ModelCard(text_of(report, saved)).data
    assert data.base_model == "gpt2"
    assert data["base_model_relation"] == "finetune"  # a packed one would pass for a quantized one
    assert (data.license, data.language, data.library_name) == ("mit", ["en", "de"], "transformers")
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["allenai/c4"]
    assert data.tags == ["pruned", "sparse", "2:4", "sparsegpt", "llmprune"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("perplexity", 25.0, "Salesforce/wikitext")
    assert (result.dataset_config, result.dataset_split) == ("wikitext-2-raw-v1", "test")
    assert data.model_name == "m"


def test_dense_beside_pruned_with_recovery(report: Report, saved: Path) -> None:
    text = text_of(report, saved)
    assert "| perplexity, wikitext2 test | 20 ± 0.5 | 25 ± 0.5 | 80.0% |" in text
    assert "| KL divergence from dense per token, wikitext2 test | 0 | 0.125 ± 0.01 nats |  |" in text
    assert "| same likeliest token as dense, wikitext2 test | 100 % | 75 % |  |" in text
    assert "| piqa, acc | 80 % | 60 % | 75.0% |" in text
    for protocol in ("wikitext2 test: as it is measured.", "KL as it is measured.", "piqa: zero-shot."):
        assert f"\n- {protocol}\n" in text


def test_what_was_done_what_is_zero_and_how_to_load_it(report: Report, saved: Path) -> None:
    text = text_of(report, saved)
    assert "[SparseGPT](https://arxiv.org/abs/2301.00774)" in text
    assert "c4 train, commit `1111111111111111111111111111111111111111`, 128 windows of 2048 tokens, seed 0" in text
    assert re.search(r"\| self_attn\.q_proj \| 2 \| 2:4 \| 50\.00% \| 0\.000 \|", text)
    assert "2 matrices (router)" not in text
    assert "1 matrix (router), all norms" in text
    assert "Weights on disk: 2.0 MB in 1 file." in flat(text)
    assert 'AutoModelForCausalLM.from_pretrained("ada/m")' in text
    assert "as large and as fast as the base model" in flat(text)
    assert "import llmprune" not in text
    assert "The licence is the base model's: mit." in text


def test_features_that_changed_places_are_told(report: Report, saved: Path) -> None:
    told = "an adapter that was made for the base model does not fit"
    moved = replace(report, config={**CONFIG, "permute": True})
    nothing = replace(moved, notes=("permute did nothing: in no layer could it be proved that …",))
    found = [told in flat(text_of(each, saved)) for each in (report, moved, nothing)]
    assert found == [False, True, False]


def test_a_packed_checkpoint_says_how_it_is_loaded(report: Report, saved: Path) -> None:
    (saved / "config.json").write_text(
        '{"quantization_config": {"quant_method": "llmprune", "format": 1, "weights": {}}}'
    )
    text = text_of(report, saved)
    assert "import llmprune  # teaches transformers" in text
    assert "llmprune unpack" in text
    assert re.search(r"Weights on disk: 2\.0 MB in 1 file, \d+% of the dense 0\.\d MB\.", flat(text))


def test_no_path_of_somebodys_machine(report: Report, saved: Path) -> None:
    local = replace(report, source={"id": "/data/ada/models/secret-7b", "revision": None, "card": {}})
    text = text_of(local, saved)
    assert "/data" not in text
    assert "ada/out" not in text
    assert "llmprune --model gpt2 --output-dir=out --config run.yaml" in text
    assert "`secret-7b` with" in text
    data = ModelCard(text).data
    assert (data.base_model, data.get("base_model_relation"), data.datasets) == (None, None, None)
    assert "names no licence" in text
    assert data.license is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("texts of /home/ada/a.txt, joined", "texts of a.txt, joined"),
        (r"C:\Users\ada\b.txt", "b.txt"),
        ("~/c/d", "d"),
        ("https://arxiv.org/abs/2306.11695 and/or 2:4", "https://arxiv.org/abs/2306.11695 and/or 2:4"),
        ("Salesforce/wikitext 1/2", "Salesforce/wikitext 1/2"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_generated_text_cannot_close_its_fence(report: Report, saved: Path) -> None:
    assert "````text\nprompt  One ``` day\ndense   a | b c\npruned  d\n````" in text_of(report, saved)


def test_without_an_evaluation_the_card_says_so(report: Report, saved: Path) -> None:
    bare = replace(report, before=(), after=(), generations=())
    text = text_of(bare, saved)
    assert "It was not measured." in text
    assert "What it writes" not in text
    assert "model-index" not in text


def test_a_report_of_schema_1_has_perplexities_only(report: Report, saved: Path) -> None:
    old = {key: value for key, value in perplexity(30.0).items() if key not in ("kind", "divergence")}
    text = text_of(replace(report, before=(old,), after=(old,), source={"id": "x", "revision": None}), saved)
    assert "| perplexity, wikitext2 test | 30 ± 0.5 | 30 ± 0.5 | 100.0% |" in text


def test_a_name_that_is_no_text_does_not_lose_the_model(report: Report, saved: Path) -> None:
    """As Python reads a file's name whose bytes are not UTF-8."""
    text = text_of(replace(report, config={**CONFIG, "dataset": "caf\udce9.txt"}, command="llmprune caf\udce9"), saved)
    assert text.encode("utf-8")
    assert "caf?" in text


def test_an_odd_name_breaks_neither_table_nor_yaml(report: Report, saved: Path) -> None:
    rows = tuple({**row, "dataset": "a|b: {{ 1 }}\n# c"} for row in report.after[:1])
    text = text_of(replace(report, before=report.before[:1], after=rows), saved)
    assert "| perplexity, a\\|b: {{ 1 }} # c |" in text
    assert ModelCard(text).data.eval_results[0].dataset_name == "a|b: {{ 1 }}\n# c"


def test_an_edited_card_is_never_written_over(report: Report, saved: Path) -> None:
    write_card(saved, report, name="one")
    path = saved / CARD
    assert is_generated(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # a checkout on Windows edits nothing
    assert is_generated(path)
    write_card(saved, report, name="two")
    assert "# two\n" in path.read_text()
    edited = path.read_text().replace("# two", "# My two")
    path.write_text(edited)
    assert not is_generated(path)
    write_card(saved, report, name="three")
    assert path.read_text() == edited


def test_a_card_is_made_again_from_the_saved_report(report: Report, saved: Path) -> None:
    """With another name, as a push does; without a card there is nothing to renew."""
    report.write(saved)
    refresh_card(saved, name="ada/m")
    assert not (saved / CARD).exists()
    write_card(saved, report, name="m")
    refresh_card(saved, name="ada/m")
    assert (saved / CARD).read_text() == text_of(Report.read(saved), saved)
    assert not list(saved.glob(".*"))


def test_the_base_models_card(tmp_path: Path) -> None:
    assert read_base_card(None, hub_id=None) == read_base_card(tmp_path, hub_id=None) == {}
    (tmp_path / CARD).write_text(
        "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: en\ntags: [a]\n---\n# Base\n"
    )
    inherited = {"license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": "en"}
    assert read_base_card(tmp_path, hub_id=None) == inherited
    assert read_base_card(tmp_path, hub_id="meta/base") == {"base_model": "meta/base", **inherited}
    (tmp_path / CARD).write_text("---\nlanguage: [en, no]\n---\n")  # YAML reads Norwegian as false
    assert read_base_card(tmp_path, hub_id=None) == {"language": ["en", "no"]}


@pytest.mark.parametrize("card", [b"# no front matter\n", b"---\n[1\n---\n", b"---\n- a\n---\n", b"\xff\xfe---\n"])
def test_a_base_card_that_cannot_be_read_says_nothing(tmp_path: Path, card: bytes) -> None:
    (tmp_path / CARD).write_bytes(card)
    assert read_base_card(tmp_path, hub_id=None) == {}


def test_an_unstructured_sparsity_is_named_so(report: Report, saved: Path) -> None:
    text = text_of(replace(report, config={**CONFIG, "sparsity": "50%", "effort": "best"}), saved)
    assert "pruned to 50% unstructured sparsity by" in text
    assert ModelCard(text).data.tags[2] == "unstructured"
    assert "Effort `best`; llmprune" in text


def test_every_method_has_a_title() -> None:
    assert METHOD_TITLES.keys() == METHODS.keys()


def test_skipped_weights_are_counted_by_reason(report: Report, saved: Path) -> None:
    skipped = (*report.skipped, SkippedWeight("a", (4, 4), "--ignore"), SkippedWeight("b", (4, 4), "--ignore"))
    assert "1 matrix (router), 2 matrices (--ignore), all norms" in text_of(replace(report, skipped=skipped), saved)
