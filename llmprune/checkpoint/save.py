"""A pruned model as files that transformers, and whoever reads its files, loads without llmprune.

The weights are dense tensors with zeros in them, under the names that the Hub's files use, so `config.json` must name
no quantization. What was done stands there under a key of our own, `llmprune_config`, which every reader ignores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.checkpoint.carry import Carried, carry_over
from llmprune.checkpoint.provenance import cleaned
from llmprune.checkpoint.shards import write_shards
from llmprune.checkpoint.stream import WEIGHTS
from llmprune.checkpoint.target import write_errors
from llmprune.errors import UserError
from llmprune.model import shelf_of

__all__ = ["check_generation_config", "write"]

# What GenerationConfig.validate(strict=True) objects to, with the value at which each has no effect.
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "top_h": None,
}
_BEAMS = {"early_stopping": False, "length_penalty": 1.0}


def check_generation_config(model: PreTrainedModel) -> list[str]:
    """Make sure, right after loading, that `save_pretrained` will not refuse the configurations at the very end.

    It is asked by saving them, into a directory that is thrown away. A configuration that passes is left alone, odd or
    not, so that the pruned model generates as its original does. Where it does not pass, harmless contradictions are
    settled as their author must have meant them: sampling settings beside no `do_sample` mean that it should sample;
    beside an explicit `do_sample=False`, and in general, a setting without effect goes.

    Returns one sentence for every setting that was changed.

    Raises
    ------
    UserError
        if transformers would still refuse, with its reason.
    """
    if _refusal(model) is None:
        return []
    notes = _settle(model.generation_config) if isinstance(model.generation_config, GenerationConfig) else []
    if (reason := _refusal(model)) is not None:
        raise UserError(
            "transformers refuses to save this model's configuration, so the pruned model could not be written: "
            f"{' '.join(reason.split())} Correct config.json or generation_config.json in a local copy of the model."
        )
    return notes


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    source: Path | None,
    max_shard_size: str,
    provenance: Mapping[str, Any],
) -> Carried:
    """Write the model, its tokenizer and what belongs to them into `directory`, which exists and is empty.

    `source` is the directory of the original's files, or None where there is none to carry anything over from (a GGUF,
    a model made in memory). `provenance` goes into config.json as `llmprune_config`, without secrets and home
    directories, and stays on `model.config`.

    Returns what came along from the source beside the model's own files.

    Raises
    ------
    UserError
        if the model is still quantized, or the files cannot be written (disk full).
    """
    _check_dense(model)
    model.config.llmprune_config = cleaned(dict(provenance))
    with write_errors(directory):
        if shelf_of(model) is None:
            model.save_pretrained(directory, max_shard_size=max_shard_size)
        else:
            model.save_pretrained(directory, state_dict={})  # all but the weights
            (directory / WEIGHTS).unlink(missing_ok=True)
            write_shards(model, directory, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return carry_over(model, directory, source=source)


def _check_dense(model: PreTrainedModel) -> None:
    """A leftover quantizer refuses to save; with a leftover `quantization_config` readers unpack what is dense."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
            raise UserError(
                "The model still carries a quantization_config; llmprune saves dense weights only. Load it dequantized "
                "and drop the configuration."
            )


def _refusal(model: PreTrainedModel) -> str | None:
    """Why `save_pretrained` would refuse the model's configurations, or None."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model.config.save_pretrained(scratch)
            if model.can_generate():
                model.generation_config.save_pretrained(scratch)
        except ValueError as error:
            return str(error)
    return None


def _settle(config: GenerationConfig) -> list[str]:
    notes: list[str] = []
    sampling = [name for name, neutral in _SAMPLING.items() if getattr(config, name, None) not in (None, neutral)]
    if sampling and config.do_sample is None:
        config.do_sample = True
        notes.append(f"generation_config: do_sample=True was added, because {', '.join(sampling)} is set")
    elif sampling and config.do_sample is False:
        notes += [_drop(config, name, "do_sample is False") for name in sampling]
    if config.num_beams in (None, 1):
        beams = [name for name, neutral in _BEAMS.items() if getattr(config, name, None) not in (None, neutral)]
        notes += [_drop(config, name, "there is one beam") for name in beams]
    if config.return_dict_in_generate is not True:
        flags = [name for name in config.extra_output_flags if getattr(config, name, None) is True]
        notes += [_drop(config, name, "return_dict_in_generate is not True") for name in flags]
    if config.use_cache is False and config.cache_implementation is not None:
        notes.append(_drop(config, "cache_implementation", "use_cache is False"))
    if config.pad_token_id is not None and config.pad_token_id < 0:
        notes.append(_drop(config, "pad_token_id", "no token has a negative id"))
    return notes


def _drop(config: GenerationConfig, name: str, why: str) -> str:
    value = getattr(config, name)
    setattr(config, name, None)
    return f"generation_config: {name}={value} was dropped, because {why}"
