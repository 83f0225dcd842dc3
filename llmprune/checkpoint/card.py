"""The model card: README.md beside the weights, made from the report and the files, so that nobody has to write it.

Its front matter is `huggingface_hub.ModelCardData`, its text the template card.md.jinja. The Hub knows four ways to be
another model's child, and "pruned" is none of them: we say finetune, and pruned in the tags and the text. (Left to
itself, it would take a packed checkpoint for a quantized one.)

A card of ours carries the hash of its text in its last line. So an edited one is seen to be somebody's own, and is
never written over.
"""

from __future__ import annotations

import hashlib
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

import llmprune
from llmprune.checkpoint.card_facts import CardFacts, without_paths
from llmprune.checkpoint.report import REPORT, Report

__all__ = ["CARD", "card_data", "card_text", "is_generated", "refresh_card", "write_card"]

CARD = "README.md"

_MARK = re.compile(
    r"\n<!-- Written by llmprune \S+, text ([0-9a-f]{16}): an edited card is never written over\. -->\n*\Z"
)

# A data set's file in the layouts of the Hub: wikitext-2-raw-v1/test-00000-of-00001.parquet,
# en/c4-validation.00000-of-00008.json.gz.
_SPLIT_FILE = re.compile(r"(?P<config>[^/]+)/(?:\w+-)?(?P<split>train|validation|test)[-.]\d{5}-of-")


def write_card(directory: Path, report: Report, *, name: str) -> None:
    """Write the card of the checkpoint in `directory`, unless a person wrote or edited the one that is there.

    `name` is what `from_pretrained` will be called with: a repository's id, or the directory's name.
    """
    path, text = directory / CARD, card_text(CardFacts(report, directory, name))
    if path.exists() and (not is_generated(path) or path.read_text(encoding="utf-8") == text):
        return
    scratch = directory / f".{CARD}.{os.getpid()}"
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def refresh_card(directory: Path, *, name: str) -> None:
    """Write the card again, after the files in `directory` or its name have changed, if it is ours to write."""
    if (directory / REPORT).is_file() and is_generated(directory / CARD):
        write_card(directory, Report.read(directory), name=name)


def is_generated(path: Path) -> bool:
    """Whether the card at `path` is as llmprune wrote it. One that is not there is nobody's."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _hash(text[: mark.start()])


def card_text(facts: CardFacts) -> str:
    """The whole card."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    template = environment.from_string(files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"))
    rendered = template.render(facts.template_values(), front_matter=card_data(facts).to_yaml())
    text = re.sub(r"\n{3,}", "\n\n", rendered).rstrip() + "\n"
    text = text.encode("utf-8", "replace").decode()  # a file's name may hold bytes that are no text
    mark = f"Written by llmprune {llmprune.__version__}, text {_hash(text)}: an edited card is never written over."
    return f"{text}\n<!-- {mark} -->\n"


def card_data(facts: CardFacts) -> ModelCardData:
    """The front matter."""
    report, base = facts.report, facts.base_card
    pattern = facts.config["sparsity"]
    calibration = report.source.get("calibration", {}).get("repo")
    return ModelCardData(
        base_model=base.get("base_model"),
        base_model_relation="finetune" if "base_model" in base else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        language=base.get("language"),
        datasets=[calibration] if calibration else None,
        tags=["pruned", "sparse", pattern if ":" in pattern else "unstructured", facts.config["method"], "llmprune"],
        model_name=facts.title,
        eval_results=[*map(_result, facts.perplexities)] or None,
    )


def _result(row: dict[str, Any]) -> EvalResult:
    """A perplexity for the card's `model-index`."""
    origin = row["provenance"]
    place = _SPLIT_FILE.match(origin.get("file") or "")
    return EvalResult(
        task_type="text-generation",
        dataset_type=origin["repo"],
        dataset_name=without_paths(row["dataset"]),
        dataset_config=origin.get("config") or (place["config"] if place else None),
        dataset_split=origin.get("split") or (place["split"] if place else None),
        dataset_revision=origin.get("revision"),
        metric_type="perplexity",
        metric_name=f"perplexity, {row['tokens']} tokens in windows of {row['seq_len']}",
        metric_value=round(row["value"], 4),
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]
