"""Runs of two and three processes, on gloo, beside the same runs of one: the same masks, the same model.

All runs of one number of processes are made by one team, so that it is set up once.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.checkpoint.report import Report
from llmprune.config import EvaluationConfig, PruneConfig
from llmprune.distributed import Team, team_from_environment
from llmprune.job import Job, run
from tests.builders import tiny_model, tiny_tokenizer
from tests.distributed.processes import together
from tests.resumable import tensors

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 64, (11, 32), generator=torch.Generator().manual_seed(0))

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("llama", {"method": "magnitude"}),  # one batch: some processes have none
    "sparsegpt": ("llama", {"method": "sparsegpt", "batch_size": 2}),
    "balanced": ("llama", {}),  # permutations, dense targets with held-out windows
    "unstructured": ("llama", {"sparsity": "0.5"}),  # whole linears, in one process each
    "allocated": ("llama", {"method": "wanda", "sparsity": "0.5", "allocation": "owl"}),
    "biases": ("gpt2", {"permute": False}),
    "experts": ("mixtral", {}),  # cold ones, and some that no token of a process meets
    "stacked experts": ("gpt_oss", {"method": "wanda"}),  # transposed, all experts in one product
    "low memory": ("llama", {"low_memory": True}),
}
OF_THREE = ("magnitude", "balanced", "unstructured", "experts", "low memory")
"""Those of them that three processes do too."""

PAIRS = [*((case, "2") for case in CASES), *((case, "3") for case in OF_THREE)]

FEW = 4
"""Windows of the case with experts: so few that experts are cold."""


def job(folder: Path, case: str, output: str) -> Job:
    family, settings = CASES[case]
    config = {name: value for name, value in settings.items() if name != "low_memory"}
    ids = IDS[:FEW] if case == "experts" else IDS
    return Job(
        str(folder / family),
        config=PruneConfig(num_samples=len(ids), **config),
        evaluation=EvaluationConfig(()),
        dataset=ids,
        output_dir=folder / output / case,
        low_memory=settings.get("low_memory", False),
    )


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        found.update(parameter.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def all_cases(folder: Path, output: str) -> None:
    """What each process of a team does; leaves the checkpoints of rank 0, and what each process has in the end."""
    with team_from_environment() as team:
        for case in [case for case, count in PAIRS if count == output]:
            result = run(job(folder, case, output), team=team)
            if result.model is not None:
                (folder / output / f"{case}.{team.rank}").write_text(digest(result.model))
            if not team.leads:
                assert result.report.notes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all cases by one process, in this one, and by teams of two and three."""
    folder = tmp_path_factory.mktemp("many")
    for family in {family for family, _ in CASES.values()}:
        tiny_model(family).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    for case in CASES:
        run(job(folder, case, "1"), team=Team())
    for count in (2, 3):
        together(count, all_cases, folder, str(count), log=folder / "log")
    return folder


def report(folder: Path, output: str, case: str) -> Report:
    return Report.read(folder / output / case)


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: Tensor = model(torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(1))).logits
    return found


def perplexity(folder: Path) -> float:
    targets = torch.randint(3, 64, (8, 32), generator=torch.Generator().manual_seed(1))[:, 1:]
    found = logits(folder)[:, :-1]
    return torch.nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten()).exp().item()


@pytest.mark.parametrize(("case", "count"), PAIRS)
def test_several_processes_prune_as_one_does(folder: Path, case: str, count: str) -> None:
    one, several = (tensors(folder / output / case) for output in ("1", count))
    pruned = {row.parameter for row in report(folder, "1", case).pruned}
    equal = torch.cat([((several[name] == 0) == (one[name] == 0)).flatten() for name in one if name in pruned])
    assert equal.float().mean() >= 0.999
    assert perplexity(folder / count / case) == pytest.approx(perplexity(folder / "1" / case), rel=1e-3)
    torch.testing.assert_close(logits(folder / count / case), logits(folder / "1" / case), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("case", "count"), PAIRS)
def test_the_report_is_that_of_one_process(folder: Path, case: str, count: str) -> None:
    rows = [report(folder, output, case).pruned for output in ("1", count)]
    for one, other in zip(*rows, strict=True):
        assert other.error == pytest.approx(one.error, rel=1e-2)
        assert (other.step is None) == (one.step is None)
        assert (other.step or 0) == pytest.approx(one.step or 0, rel=1e-2, abs=1e-6)
        for name in ("name", "shape", "pattern", "zeros", "tokens", "notes"):
            assert asdict(other)[name] == asdict(one)[name]
    assert f"pruned by {count} processes" in report(folder, count, case).notes


@pytest.mark.parametrize(("case", "count"), PAIRS)
def test_every_process_has_the_same_model_in_the_end(folder: Path, case: str, count: str) -> None:
    found = [path.read_text() for path in sorted((folder / count).glob(f"{case}.?"))]
    assert len(found) == (0 if case == "low memory" else int(count))
    assert len(set(found)) <= 1


@pytest.mark.parametrize("count", ["2", "3"])
def test_low_memory_gives_the_bits_of_the_run_in_memory(folder: Path, count: str) -> None:
    whole, part = (tensors(folder / count / case) for case in ("balanced", "low memory"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert not list((folder / count).glob("*.partial"))


def test_the_processes_print_nothing_of_their_own(folder: Path) -> None:
    told = "".join(path.read_text() for path in folder.glob("log.?"))
    assert not [line for line in told.splitlines() if line.strip() and "model shards" not in line]
