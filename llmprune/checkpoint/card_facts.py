"""What a model card says, as words and rows: everything is taken from the report and from the files beside it."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint.base_card import LICENCE_FILES
from llmprune.checkpoint.packed import packed_entries
from llmprune.checkpoint.provenance import cleaned
from llmprune.checkpoint.report import Report
from llmprune.results import PrunedWeight

__all__ = ["METHOD_TITLES", "CardFacts", "without_paths"]

METHOD_TITLES = {
    "magnitude": "magnitude pruning",
    "wanda": "[Wanda](https://arxiv.org/abs/2306.11695)",
    "sparsegpt": "[SparseGPT](https://arxiv.org/abs/2301.00774)",
    "alps": "[ALPS](https://arxiv.org/abs/2406.07831)",
}

_PATH = re.compile(r"(?<![\w/.:~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;|)]+[/\\])*([^\s/\\'\"`,;|)]*)")


def without_paths(text: str) -> str:
    """`text` with every absolute path reduced to its last part: a card's readers are not on this machine."""
    return _PATH.sub(lambda match: match[1] or "…", text)


@dataclass(frozen=True)
class CardFacts:
    """The report of the checkpoint in `directory`, in the words of its card.

    name : what `from_pretrained` is called with
    """

    report: Report
    directory: Path
    name: str

    @property
    def title(self) -> str:
        """The name without its namespace."""
        return self.name.rpartition("/")[2]

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run."""
        return self.report.config

    @property
    def base_card(self) -> dict[str, Any]:
        """What `read_base_card` found."""
        return dict(self.report.source.get("card") or {})

    @property
    def base(self) -> str:
        """The base model, with a link if it is one of the Hub."""
        if known := self.base_card.get("base_model"):
            return f"[{known}](https://huggingface.co/{known})"
        return f"`{Path(str(self.report.source['id'])).name}`"

    @property
    def perplexities(self) -> list[dict[str, Any]]:
        """Those of the pruned model on texts of the Hub."""
        return [row for row in self.report.after if _is_perplexity(row) and (row.get("provenance") or {}).get("repo")]

    def template_values(self) -> dict[str, Any]:
        """What card.md.jinja needs, besides the front matter."""
        counts = self.report.totals
        zeros = f"Of all {counts['parameters']:,} parameters {counts['zeros'] / counts['parameters']:.1%} are zero."
        return {
            "title": self.title,
            "name": self.name,
            "base": self.base,
            "count": counts["pruned_weights"],
            "pattern_told": _pattern_told(self.config["sparsity"]),
            "method": METHOD_TITLES[self.config["method"]],
            "version": self.report.versions["llmprune"],
            "zeros_told": zeros,
            "quality": list(self._quality()),
            "protocols": list(dict.fromkeys(self._protocols())),
            "generations": [_generation(row) for row in self.report.generations],
            "packed": self._is_packed,
            "kinds": list(_kinds(self.report.pruned)),
            "dense_told": self._dense_told(),
            "size_told": self._size_told(),
            "command": self._command(),
            "calibration": self._calibration(),
            "revision": self.report.source.get("revision"),
            "made_with": self._made_with(),
            "reordered": self.config.get("permute") and not any("permute did" in note for note in self.report.notes),
            "licence_told": self._licence_told(),
        }

    @property
    def _is_packed(self) -> bool:
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        return packed_entries(config) is not None

    def _quality(self) -> Iterator[dict[str, str]]:
        for dense, pruned in zip(self.report.before, self.report.after):
            if _is_perplexity(pruned):
                values = {"dense": _with_error(dense), "pruned": _with_error(pruned)}
                recovery = f"{dense['value'] / pruned['value']:.1%}"
                yield {"what": f"perplexity, {without_paths(pruned['dataset'])}", **values, "recovery": recovery}
                yield from _divergence(pruned)
            else:
                both = {"dense": dense, "pruned": pruned}
                values = {name: _percent(row["value"], row["standard_error"]) for name, row in both.items()}
                recovery = f"{pruned['value'] / dense['value']:.1%}" if dense["value"] else "n/a"
                yield {"what": f"{pruned['task']}, {pruned['metric']}", **values, "recovery": recovery}

    def _protocols(self) -> Iterator[str]:
        for row in self.report.after:
            yield without_paths(row["protocol"])
            if told := row.get("divergence"):
                yield without_paths(told["protocol"])

    def _dense_told(self) -> str:
        reasons = Counter(row.reason for row in self.report.skipped)
        left = [
            f"{count} {'matrix' if count == 1 else 'matrices'} ({without_paths(reason)})"
            for reason, count in reasons.items()
        ]
        return f"Left as they were: {', '.join([*left, 'all norms'])}."

    def _size_told(self) -> str:
        weights = sorted(self.directory.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in weights)
        dense = sum(prod(held.shape) * getattr(torch, held.dtype).itemsize for held in self.report.tensors.values())
        told = f"Weights on disk: {size / 1e6:,.1f} MB in {len(weights)} file{'s' if len(weights) > 1 else ''}"
        return f"{told}, {size / dense:.0%} of the dense {dense / 1e6:,.1f} MB." if self._is_packed else f"{told}."

    def _command(self) -> str:
        if self.report.command.startswith("llmprune.prune("):
            return str(cleaned(self.report.command))
        words = shlex.split(cleaned(self.report.command))
        program = "llmprune" if words[0] == "__main__.py" else words[0]
        return shlex.join([program, *map(_public_word, words[1:])])

    def _calibration(self) -> str:
        origin = self.report.source.get("calibration", {})
        text = without_paths(str(origin.get("name", self.config["dataset"])))
        windows = f"{self.config['num_samples']} windows of {self.config['seq_len']} tokens, seed {self.config['seed']}"
        commit = f", commit `{origin['revision']}`" if origin.get("revision") else ""
        return f"{text}{commit}, {windows}"

    def _made_with(self) -> str:
        versions, seconds = self.report.versions, sum(self.report.seconds.values())
        tools = ", ".join(f"{name} {versions[name]}" for name in ("llmprune", "torch", "transformers"))
        effort = f"Effort `{self.config['effort']}`; " if self.config.get("effort") else ""
        return f"{effort}{tools}; {seconds / 60:,.1f} minutes in all on {versions['device']}."

    def _licence_told(self) -> str:
        known = self.base_card.get("license_name") or self.base_card.get("license")
        names = [path.name for pattern in LICENCE_FILES for path in sorted(self.directory.glob(pattern))]
        copied = f" Its licence files came along: {', '.join(f'`{name}`' for name in names)}." if names else ""
        if known:
            return f"The licence is the base model's: {known}.{copied}"
        return f"The base model's card, as far as it was at hand, names no licence; its terms hold here too.{copied}"


def _is_perplexity(row: dict[str, Any]) -> bool:
    return bool(row.get("kind", "perplexity") == "perplexity")  # reports of schema 1 have perplexities only


def _with_error(row: dict[str, Any]) -> str:
    return _number(row["value"], row["standard_error"])


def _percent(share: float, error: float | None) -> str:
    return f"{_number(100 * share, None if error is None else 100 * error)} %"


def _number(value: float, error: float | None) -> str:
    return f"{value:.4g} ± {error:.2g}" if error is not None else f"{value:.4g}"


def _divergence(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    told = row.get("divergence")
    if not told:
        return
    where = without_paths(row["dataset"])
    kl = f"{_number(told['kl'], told['kl_standard_error'])} nats"
    yield {"what": f"KL divergence from dense per token, {where}", "dense": "0", "pruned": kl, "recovery": ""}
    top1 = _percent(told["top1_agreement"], told["top1_standard_error"])
    yield {"what": f"same likeliest token as dense, {where}", "dense": "100 %", "pruned": top1, "recovery": ""}


def _pattern_told(pattern: str) -> str:
    if ":" not in pattern:
        return f"{pattern} unstructured sparsity"
    kept, group = pattern.split(":")
    return f"{pattern} sparsity ({kept} of every {group} consecutive inputs kept)"


def _kinds(pruned: tuple[PrunedWeight, ...]) -> Iterator[dict[str, Any]]:
    """One row for every name that linears have: their patterns, zeros and mean error."""
    kinds: dict[str, list[PrunedWeight]] = {}
    for row in pruned:
        kinds.setdefault(".".join(row.parameter.removesuffix(".weight").split(".")[-2:]), []).append(row)
    for name, rows in kinds.items():
        errors = [row.error for row in rows if row.error is not None]
        patterns = sorted({row.pattern for row in rows})
        elements = sum(prod(row.shape) for row in rows)
        yield {
            "name": name,
            "count": len(rows),
            "pattern": patterns[0] if len(patterns) == 1 else f"{len(patterns)}, {patterns[0]} to {patterns[-1]}",
            "zeros": f"{sum(row.zeros for row in rows) / elements:.2%}",
            "error": f"{sum(errors) / len(errors):.3f}" if errors else "n/a",
        }


def _generation(row: dict[str, Any]) -> str:
    """A prompt and its two continuations in a fence that the text cannot close."""
    parts = [(name, " ".join(row[name].split())) for name in ("prompt", "dense", "pruned")]
    text = "\n".join(f"{name:<7} {part}" for name, part in parts)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _public_word(word: str) -> str:
    """A word of a command line, without the path that leads to what it names."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if Path(value).is_absolute() or value.startswith("~"):
        value = Path(value).name
    return f"{option}{equals}{value}"
