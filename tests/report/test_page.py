"""The page of one run: whole, self-contained, safe with any text, and right in its numbers."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmprune.errors import UserError
from llmprune.report.document import PAGE, REPORT, Run
from llmprune.report.page import run_page, write_page
from llmprune.report.sentences import sameness_told
from tests.report.documents import document, first_schema, pruned_row

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """The tags of a page, its text, and whether every tag is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        """All that is said, blanks as one."""
        return " ".join(" ".join(self.said).split())


def page_of(held: dict[str, Any], saved_bytes: int | None = None) -> str:
    return run_page(Run(Path("out"), held, saved_bytes))


@cache
def plain_page() -> str:
    """The page of the document as it is."""
    return page_of(document())


def test_it_says_what_was_done_and_what_it_cost() -> None:
    text = Reader(page_of(document(), saved_bytes=512)).text
    for expected in (
        "tiny, pruned to 2:4",
        "6 weights in 3 decoder layers have 50% of their entries set to zero by Wanda.",
        "Perplexity on a text goes from 10.00 to 12.50, 1.25 times the dense model's.",
        "For 71% of the tokens its first choice is the dense model's.",
        "10.00 ± 0.50 12.50 ± 0.50 80.0% 0.3100 ± 0.010 71.3% ± 0.40 2,040 tokens",
        "lambada · acc 40.0% ± 1.0 30.0% ± 1.0 75.0% 500 items",
        "the largest, 0.300, is self_attn.q_proj of layer 2",
        "mlp.up_proj 3 2:4 384 50.00% 0.200 0.300",
        "mlp.gate 1 128 router",
        "as large as dense",
        "1 min 02 s in all. Peak memory: 2.00 GB (cpu).",
        "Distilled in 2 passes: 0.600 → 0.400 nats a token",
        "upon a hill",
        "pruned · the same for 2 tokens",
        "llmprune --model m",
        "a note",
    ):
        assert expected in text, expected


def test_it_needs_nothing_but_itself_and_runs_no_script() -> None:
    page = Reader(plain_page())
    assert "script" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}, tag
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), tag
    assert not re.findall(r"url\((?!#)|@import", plain_page())
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_whatever_a_report_holds_is_text() -> None:
    held = document()
    held["model"]["name"] = held["command"] = held["notes"][0] = held["config"]["dataset"] = SCRIPT
    held["generations"][0] |= {"prompt": SCRIPT, "dense": SCRIPT, "pruned": SCRIPT}
    held["skipped"][0]["reason"] = held["before"][0]["dataset"] = held["before"][0]["protocol"] = SCRIPT
    held["pruned"].append(pruned_row(0, f"mlp.{SCRIPT}"))
    held["versions"][SCRIPT] = held["source"]["calibration"][SCRIPT] = held["seconds"][SCRIPT] = 1
    page = page_of(held)
    assert "<script" not in page
    assert Reader(page).text.count(SCRIPT) > 12


def test_a_formula_in_a_name_stays_text() -> None:
    held = document()
    held["before"][0]["dataset"] = r"$\frac{a$ costs $5"
    assert r"$\frac{a$ costs $5" in Reader(page_of(held)).text


def test_every_plot_has_words_in_its_place_and_ids_are_unique() -> None:
    page = Reader(plain_page())
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(plots) == 2 * 5  # perplexity, score, errors, sparsity, stages: each wide and narrow
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 20 for plot in plots)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = re.findall(r"(?:url\(|href=\")#([\w-]+)", plain_page())
    assert set(referred) <= set(ids)


def test_every_colour_follows_light_and_dark() -> None:
    page = plain_page()
    _, dark = page.split("prefers-color-scheme: dark", 1)
    assert not re.findall(r"(?:fill|stroke): ?#", page)
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert all(f"{name}:#" in dark for name in used)


def test_a_large_model_is_a_cell_for_each_linear_and_a_small_file() -> None:
    held = document()
    linears = [f"self_attn.{which}_proj" for which in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    held["pruned"] = [pruned_row(layer, linear) for layer in range(80) for linear in linears]
    page = page_of(held)
    assert page.count("<title>layer ") == 2 * (80 * 7 + 80 + 1)  # cells and bars, wide and narrow; and the router
    assert len(page) < 700_000


def test_a_stack_of_experts_is_one_cell_with_their_mean_and_their_worst() -> None:
    held = document()
    errors = [0.1, 0.3, None, float("nan")]
    held["pruned"] = [pruned_row(0, "mlp.experts.down_proj", error, expert) for expert, error in enumerate(errors)]
    page = page_of(held)
    expected = "layer 0, mlp.experts.down_proj: error 0.2000; mean of 4 experts, worst 0.3000; 50.0% zeros (2:4)"
    assert page.count(f"<title>{expected}</title>") == 2
    assert "mlp.experts.down_proj 4 2:4 512 50.00% 0.200 0.300" in Reader(page).text


@pytest.mark.parametrize(
    "missing", ["after", "before", "seconds", "generations", "tuned", "notes", "skipped", "pruned"]
)
def test_what_a_run_does_not_have_is_left_out(missing: str) -> None:
    held = document()
    held[missing] = {} if missing == "seconds" else []
    if missing == "before":
        held["after"] = []
    if missing == "pruned":
        held["totals"] |= {"pruned_weights": 0, "pruned_parameters": 0, "pruned_zeros": 0}
    text = Reader(page_of(held)).text
    assert ("not measured" in text) == (missing == "after")
    assert ("Nothing was measured" in text) == (missing == "before")


def test_scores_are_per_cent_on_the_axis_too_and_no_line_ends_within_an_option() -> None:
    held = document() | {"command": "llmprune --model gpt2 --sparsity 2:4"}
    page = page_of(held)
    scores = page[page.index("Dots with standard errors: lambada") :].partition("</svg>")[0]
    assert re.search(r">\d+(\.\d)?%</text>", scores)
    assert "<code><span>llmprune</span> <span>--model</span> <span>gpt2</span> " in page


def test_a_single_token_is_no_tokens() -> None:
    told = [sameness_told({"same_tokens": same, "tokens": 32}) for same in (0, 1, 2, 32)]
    assert told[1:] == ["the same for 1 token", "the same for 2 tokens", "the same 32 tokens"]
    assert told[0] == "differs from the first token on"


def test_the_page_of_an_old_report_is_drawn() -> None:
    assert "10.00 ± 0.50" in Reader(page_of(first_schema())).text


@pytest.mark.parametrize("field", ["totals", "pruned", "before"])
def test_a_damaged_report_is_one_sentence(tmp_path: Path, field: str) -> None:
    held = {**document(), field: [{"name": 1}]}
    (tmp_path / REPORT).write_text(json.dumps(held))
    with pytest.raises(UserError, match="damaged: save the model again"):
        write_page(tmp_path)
    assert not (tmp_path / PAGE).exists()
