"""On a trained model the methods rank as published, however green all else is. (The main job is in test_readme.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune


@pytest.fixture(scope="module")
def directory(shared: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """karpathy's stories260K: a trained Llama of five layers, made from llama2.c's format."""
    source, target = shared / "models/stories260K", tmp_path_factory.mktemp("real") / "stories260K"
    script = [sys.executable, str(repository / "scripts/import_llama2c")]
    subprocess.run([*script, source / "stories260K.bin", source / "tok512.bin", target], check=True)
    return target


@pytest.fixture(scope="module")
def stories(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.real
def test_the_imported_model_tells_the_story_that_it_is_known_for(directory: Path, stories: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start = tokenizer("Once upon a time", return_tensors="pt").input_ids
    story = tokenizer.decode(stories.generate(start, max_new_tokens=30, do_sample=False)[0], skip_special_tokens=True)
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the par"
    )
    text = "Hé, Zoë said: «ok»\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def written_by(model: Any, seed: int, windows: int, length: int = 128) -> Tensor:
    """Stories that the model tells itself: the only text that it knows."""
    torch.manual_seed(seed)
    start = torch.full((windows, 1), 1)
    return model.generate(start, do_sample=True, max_length=length, min_length=length, pad_token_id=0, use_cache=True)


def loss(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@pytest.mark.real
@pytest.mark.parametrize(("sparsity", "at_most"), [("2:4", 0.8), ("50%", 0.95)])
def test_on_a_trained_model_the_methods_rank_as_published(stories: Any, sparsity: str, at_most: float) -> None:
    """Dense < SparseGPT < Wanda < magnitude in loss, and SparseGPT's part of Wanda's loss is clearly below one."""
    calibration, unseen = written_by(stories, 0, 64), written_by(stories, 1, 64)
    state = {name: tensor.clone() for name, tensor in stories.state_dict().items()}
    losses = {"dense": loss(stories, unseen)}
    for method in ("sparsegpt", "wanda", "magnitude"):
        stories.load_state_dict(state)
        llmprune.prune(stories, sparsity=sparsity, method=method, dataset=calibration)
        losses[method] = loss(stories, unseen)
    stories.load_state_dict(state)
    assert list(losses) == sorted(losses, key=lambda name: losses[name]), losses
    assert losses["sparsegpt"] - losses["dense"] < at_most * (losses["wanda"] - losses["dense"]), losses
