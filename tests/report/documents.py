"""Documents for tests: small ones made by hand, as large and as odd as a test wants them."""

from __future__ import annotations

from typing import Any

__all__ = ["document", "first_schema", "pruned_row"]

_PROTOCOL = "a text: 8 windows of 256 tokens; float32 model."
_VERSIONS = dict.fromkeys(["llmprune", "torch", "transformers", "python", "platform", "device", "cpu"], "1")


def pruned_row(layer: int, linear: str, error: float | None = 0.2, expert: int | None = None) -> dict[str, Any]:
    """A weight of 8 × 16, half of it zero."""
    parameter = f"model.layers.{layer}.{linear}" + (".weight" if expert is None else "")
    return {
        "name": parameter if expert is None else f"{parameter}[{expert}]",
        "parameter": parameter,
        "expert": expert,
        "input_axis": 1,
        "layer": layer,
        "shape": [8, 16],
        "pattern": "2:4",
        "zeros": 64,
        "scope": "group",
        "error": error,
        "tokens": 100,
        "seconds": 0.1,
        "step": None,
        "notes": [],
    }


def _perplexity(value: float, divergence: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "kind": "perplexity",
        "dataset": "a text",
        "value": value,
        "standard_error": 0.5,
        "windows": 8,
        "tokens": 2040,
        "seq_len": 256,
        "bos": False,
        "dtype": "float32",
        "seconds": 1.0,
        "protocol": _PROTOCOL,
        "provenance": {},
        "versions": {"torch": "1"},
        "divergence": divergence,
    }


def _zero_shot(value: float) -> dict[str, Any]:
    return {
        "kind": "zero_shot",
        "task": "lambada",
        "metric": "acc",
        "value": value,
        "standard_error": 0.01,
        "items": 500,
        "shots": 0,
        "dtype": "float32",
        "seconds": 1.0,
        "protocol": "no example shown",
        "provenance": {},
        "versions": {"lm_eval": "1"},
    }


def _tensor(weights: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sha256": "0" * 64,
        "shape": [8, 16],
        "dtype": "bfloat16",
        "zeros": 64,
        "weights": weights,
        "carried": False,
        "adjusted": False,
        "touched": bool(weights),
    }


def document(layers: int = 3) -> dict[str, Any]:
    """A whole document of schema 2, with something in every field."""
    linears = ("self_attn.q_proj", "mlp.up_proj")
    divergence = {
        "kl": 0.31,
        "kl_standard_error": 0.01,
        "top1_agreement": 0.713,
        "top1_standard_error": 0.004,
        "tokens": 2040,
        "protocol": "exact",
    }
    place = {
        "weight": "w",
        "tensor": "lm_head.weight",
        "input_axis": 1,
        "box": None,
        "pattern": "2:4",
        "scope": "group",
    }
    text = {"prompt": "Once", "dense": " upon a time", "pruned": " upon a hill", "tokens": 4, "same_tokens": 2}
    return {
        "schema": 2,
        "versions": dict(_VERSIONS),
        "command": "llmprune --model m",
        "config": {
            "sparsity": "2:4",
            "effort": None,
            "method": "wanda",
            "dataset": "c4",
            "num_samples": 8,
            "seq_len": 256,
            "seed": 0,
            "dtype": "auto",
        },
        "source": {"id": "org/tiny", "revision": "abc", "calibration": {"name": "c4"}},
        "model": {"name": "tiny", "architecture": "LlamaForCausalLM", "type": "llama", "layers": layers},
        "created": "2026-01-31T12:00:00Z",
        "pruned": [pruned_row(layer, linear, 0.1 + 0.1 * layer) for layer in range(layers) for linear in linears],
        "skipped": [{"name": "model.layers.0.mlp.gate.weight", "shape": [4, 32], "reason": "router"}],
        "totals": {
            "pruned_weights": 2 * layers,
            "pruned_parameters": 256 * layers,
            "pruned_zeros": 128 * layers,
            "parameters": 1000 * layers,
            "zeros": 128 * layers,
        },
        "tensors": {"lm_head.weight": _tensor([place]), "norm.weight": _tensor([])},
        "ties": {},
        "tuned": [{"part": "model", "before": 0.6, "after": 0.4, "passes": 2}],
        "before": [_perplexity(10.0, None), _zero_shot(0.4)],
        "after": [_perplexity(12.5, divergence), _zero_shot(0.3)],
        "generations": [{**text, "protocol": "greedy"}],
        "seconds": {"load": 1.0, "prune": 61.0},
        "peak_memory_bytes": {"cpu": 2_000_000_000},
        "notes": ["a note"],
    }


def first_schema() -> dict[str, Any]:
    """The same as llmprune wrote it before schema 2."""
    old = document()
    for name in ("model", "created", "generations"):
        del old[name]
    old["before"], old["after"] = [], []
    for name, value in (("before", 10.0), ("after", 12.5)):
        row = _perplexity(value, None)
        old[name] = [{key: row[key] for key in row if key not in ("kind", "versions", "divergence")}]
    return {**old, "schema": 1}
