"""The command line in processes that can be killed: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.builders import tiny_tokenizer

__all__ = ["LAYERS", "begin", "checkpoint", "command", "run_to_end", "tensors", "wait_for"]

LAYERS = 6
PATIENCE = 120.0
"""Seconds after which a test gives up on a process."""


def checkpoint(folder: Path) -> Path:
    """A Llama of `LAYERS` small layers in bfloat16, its embeddings tied, with a tokenizer and a text beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n\n".join(72 * ["the cat sat on the mat and the hen on the roof"]))
    return folder / "model"


def command(folder: Path, output: str, *more: str) -> list[str]:
    """Prunes that checkpoint, with a safe point after every layer."""
    given = {
        "--model": folder / "model",
        "--dataset": folder / "text.txt",
        "--num-samples": 24,
        "--seq-len": 32,
        "--output-dir": folder / output,
        "--safe-points": 0,
    }
    return ["--no-eval", *more, *(str(word) for pair in given.items() for word in pair)]


def begin(arguments: list[str], limit: int | None = None) -> ForkServerProcess:
    """Start the command line. `limit` is the size in bytes beyond which no file may grow."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmprune.job", "tests.resumable"])
    process = context.Process(target=_command_line, args=(arguments, limit))
    process.start()
    return process


def run_to_end(arguments: list[str], limit: int | None = None) -> int:
    """Start the command line and wait for its exit code."""
    process = begin(arguments, limit)
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def wait_for(what: Callable[[], bool], process: ForkServerProcess) -> None:
    """Wait until something is so, or the process has ended."""
    until = time.monotonic() + PATIENCE
    while not what() and process.is_alive():
        assert time.monotonic() < until
        time.sleep(0.005)


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _command_line(arguments: list[str], limit: int | None) -> None:
    from llmprune.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    log = os.open(Path(arguments[-3]).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # beside the output
    os.dup2(log, 2)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["llmprune", *arguments]
    main()
