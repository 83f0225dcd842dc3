"""Configs: checked when made, the same in Python and in JSON, and clear about what they did not understand."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.config import EFFORTS, EvaluationConfig, PruneConfig, from_mapping
from llmprune.errors import UserError
from llmprune.methods import METHODS, Alps, Magnitude, SparseGPT, Wanda
from llmprune.sparsity.pattern import NM, Unstructured


@pytest.mark.parametrize(
    ("given_as", "kept_as"),
    [(0.5, "50%"), ("50%", "50%"), ("2:4", "2:4"), (NM(3, 7), "3:7"), (Unstructured(0.25), "25%")],
)
def test_a_sparsity_is_kept_as_text(given_as: Any, kept_as: str) -> None:
    config = PruneConfig(sparsity=given_as)
    assert config.sparsity == kept_as
    assert str(config.pattern) == kept_as


@given(st.floats(1e-6, 0.999999999))
def test_a_sparsity_loses_no_digit(sparsity: float) -> None:
    assert PruneConfig(sparsity=sparsity).pattern == Unstructured(sparsity)  # type: ignore[arg-type]


@given(
    st.fixed_dictionaries(
        {
            "sparsity": st.sampled_from(["2:4", "0.37", "50%"]),
            "method": st.none() | st.sampled_from(sorted(METHODS)),
            "dense_targets": st.none() | st.booleans(),
            "refit": st.none() | st.integers(0, 50),
            "tune": st.none() | st.integers(0, 9),
            "admm_steps": st.none(),
            "dampening_frac": st.floats(1e-6, 0.5),
            "ignore": st.lists(st.sampled_from(["down_proj", "model.layers.0.mlp.up_proj", "re:.*k_proj"])),
            "on_indivisible": st.sampled_from(["error", "skip"]),
            "text_column": st.none() | st.just("content"),
            "seq_len": st.none() | st.integers(2, 8192),
            "seed": st.integers(0, 2**32),
            "bos": st.sampled_from(["auto", "always", "never"]),
        }
    )
)
def test_a_config_comes_back_from_json_as_it_was(settings: dict[str, Any]) -> None:
    if settings["method"] in ("magnitude", "wanda") and not settings["refit"]:
        settings["dampening_frac"] = None  # these solve nothing, and refuse it
    config = from_mapping(PruneConfig, settings)
    assert from_mapping(PruneConfig, json.loads(json.dumps(asdict(config)))) == config


def test_an_evaluation_comes_back_from_json_as_it_was() -> None:
    config = EvaluationConfig(("wikitext2", "c4"), eval_tokens=1000, eval_tasks="piqa", eval_data="d", eval_limit=3)  # type: ignore[arg-type]
    assert from_mapping(EvaluationConfig, json.loads(json.dumps(asdict(config)))) == config


def test_tasks_may_be_written_with_commas() -> None:
    config = EvaluationConfig(eval_dataset=(), eval_tasks=("lambada,piqa", "hellaswag"))
    assert config.eval_tasks == ("lambada", "piqa", "hellaswag")
    assert config.asks_for_something
    assert not EvaluationConfig(eval_dataset=()).asks_for_something


def test_a_config_is_frozen_and_checked_again_when_replaced() -> None:
    config = PruneConfig()
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(UserError):
        replace(config, num_samples=0)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (PruneConfig(method="sparsegpt"), SparseGPT()),
        (
            PruneConfig(method="sparsegpt", block_size=64, dampening_frac=0.1),
            SparseGPT(block_size=64, dampening_frac=0.1),
        ),
        (PruneConfig(method="alps", dampening_frac=0.1), Alps(dampening_frac=0.1)),
        (PruneConfig(method="alps", admm_steps=40), Alps(admm_steps=40)),
        (PruneConfig(method="alps", refit=20), Alps(refit_steps=20)),
        (PruneConfig(method="wanda"), Wanda()),
        (PruneConfig(method="magnitude"), Magnitude()),
    ],
)
def test_the_method_gets_its_settings(config: PruneConfig, method: Any) -> None:
    assert config.build_method() == method


def test_a_method_that_refits_by_itself_is_not_refitted_twice() -> None:
    assert PruneConfig(method="alps", refit=20).recipe.refit == 0
    assert PruneConfig(method="wanda", refit=20).recipe.refit == 20


def test_without_a_word_the_effort_is_balanced() -> None:
    config = PruneConfig()
    assert config.effort == "balanced"
    assert {name: getattr(config, name) for name in EFFORTS["balanced"]} == EFFORTS["balanced"]


@pytest.mark.parametrize("effort", EFFORTS)
def test_an_effort_sets_the_steps_and_what_is_said_goes_before(effort: str) -> None:
    whole = {**EFFORTS[effort], "tune": 7}
    for sparsity, left_out in (("50%", {"permute": False, "polish": 0}), ("2:4", {"allocation": "uniform"})):
        config = PruneConfig(effort=effort, tune=7, sparsity=sparsity)
        assert {name: getattr(config, name) for name in whole} == whole | left_out


@pytest.mark.parametrize("method", METHODS)
def test_a_method_alone_has_nothing_added(method: str) -> None:
    config = PruneConfig(method=method)
    assert config.effort is None
    assert (config.dense_targets, config.polish, config.refit, config.tune) == (False, 0, 0, 0)
    assert config.recipe.statistic is config.build_method().statistic


@pytest.mark.parametrize("step", [{"refit": 3}, {"polish": 1}], ids=str)
def test_a_fraction_of_the_diagonal_is_added_wherever_a_step_solves(step: dict[str, Any]) -> None:
    assert PruneConfig(method="wanda", dampening_frac=0.1, **step).recipe.dampening_frac == 0.1
    config = PruneConfig(method="wanda")  # what was filled in is not refused when it comes back
    assert replace(config, seed=1).dampening_frac == config.dampening_frac


def test_a_budget_is_spent_by_the_allocation_of_the_effort() -> None:
    config = PruneConfig(effort="best", sparsity="2:4", budget=0.3, levels=("dense", "4:8"))
    assert (config.allocation, config.build_allocation().total) == ("error", 0.3)
    assert from_mapping(PruneConfig, json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(UserError, match="a budget goes with allocation 'error'"):
        PruneConfig(effort="balanced", sparsity="2:4", budget=0.3)


def test_how_a_result_is_named() -> None:
    assert PruneConfig().name_suffix == "alps-2of4"
    assert PruneConfig(sparsity="62.5%", method="wanda").name_suffix == "wanda-62.5pct"


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_names_come_in_any_row(kind: Any) -> None:
    assert PruneConfig(ignore=kind(["down_proj", "k_proj"])).ignore == ("down_proj", "k_proj")


def test_a_single_name_is_not_taken_apart() -> None:
    assert PruneConfig(ignore="down_proj").ignore == ("down_proj",)  # type: ignore[arg-type]
    assert EvaluationConfig("wikitext2").eval_dataset == ("wikitext2",)  # type: ignore[arg-type]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": "half"}, r"fraction \(0\.5\), a percentage \(50%\) or N:M"),
    ({"sparsity": 2}, r"If you meant 2 %, write 2%"),
    (
        {"method": "sparsgpt"},
        r"method is one of magnitude, wanda, sparsegpt, alps; got 'sparsgpt' \(did you mean 'sparsegpt'",
    ),
    ({"effort": "bets"}, r"effort is one of fast, balanced, best; got 'bets' \(did you mean 'best'"),
    (
        {"effort": "best", "method": "wanda"},
        r"effort 'best' chooses the method itself \(alps\); got method 'wanda' too\. Give one of the two",
    ),
    ({"permute": True, "sparsity": "50%"}, r"permute is about .* a sparsity of 50% has no groups\. Leave it out"),
    ({"polish": 1, "sparsity": "50%"}, r"polish is about .* a sparsity of 50% has no groups\. Leave it out"),
    ({"polish": 1, "sparsity": "8:16"}, r"polish tries every way to keep 8 of 16.*8:16 has 12,870\. Leave it out"),
    ({"polish": 1, "overrides": {"up_proj": "16:32"}}, r"16:32 has 601,080,390"),
    ({"polish": -1}, r"polish is a whole number, at least 0; got -1\."),
    ({"admm_steps": -1}, r"admm_steps is a whole number, at least 0; got -1\."),
    ({"method": "wanda", "block_size": 64}, r"block_size is a setting that method wanda does not have"),
    ({"admm_steps": 3, "method": "sparsegpt"}, r"admm_steps is a setting that method sparsegpt does not have"),
    ({"refit": -1}, r"refit is a whole number, at least 0; got -1\."),
    ({"tune": 1.5}, r"tune is a whole number, at least 0; got 1\.5\."),
    ({"method": "obs"}, r"method is one of magnitude, wanda, sparsegpt, alps; got 'obs'\.$"),
    ({"on_indivisible": "pad"}, r"on_indivisible is one of error, skip; got 'pad'"),
    ({"bos": "yes"}, r"bos is one of auto, always, never; got 'yes'"),
    ({"num_samples": 0}, r"num_samples is a whole number, at least 1; got 0\."),
    ({"num_samples": None}, r"num_samples is a whole number, at least 1; got None\."),
    ({"num_samples": "128"}, r"num_samples is a whole number, at least 1; got '128'\."),
    ({"seq_len": 1}, r"seq_len is a whole number, at least 2; got 1\."),
    ({"seq_len": 512.0}, r"seq_len is a whole number, at least 2; got 512\.0\."),
    ({"batch_size": True}, r"batch_size is a whole number, at least 1; got True\."),
    ({"seed": -1}, r"seed is a whole number, at least 0; got -1\."),
    ({"block_size": 0}, r"block_size is a whole number, at least 1; got 0\."),
    ({"dampening_frac": 1.0}, r"between 0 and 1, usually 0\.01; got 1\.0\."),
    ({"dampening_frac": "1e-2"}, r"between 0 and 1, usually 0\.01; got '1e-2'\."),
    ({"ignore": ["re:("]}, r"ignore: '\(' is no regular expression \(.+\)\."),
    ({"overrides": {"down_proj": "4:8", "re:(": "dense"}}, r"overrides: '\(' is no regular expression \(.+\)\."),
    ({"levels": ["4:8"]}, r"levels go with allocation 'error' and an N:M sparsity .* Got allocation 'uniform'"),
    ({"levels": ["dense", "1:4"], "sparsity": "50%", "allocation": "error"}, r"levels go with .* sparsity 50%"),
    ({"effort": "best", "levels": ["1:4"]}, r"levels go with .* Got allocation 'uniform' and sparsity 2:4"),
    ({"dampening_frac": 0.1, "method": "wanda"}, r"dampening_frac .* method wanda .* Leave it out, or give refit"),
    ({"dampening_frac": 0.1, "method": "magnitude", "dense_targets": True}, r"dampening_frac .* method magnitude"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_what_cannot_be_meant_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruneConfig(**settings)


@pytest.mark.parametrize("settings", [{"eval_tokens": 1}, {"eval_seq_len": 1}, {"eval_tokens": 1e4}])
def test_what_cannot_be_measured_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is a whole number, at least 2; got"):
        EvaluationConfig(**settings)
    with pytest.raises(UserError, match="eval_limit is a whole number, at least 1; got 0"):
        EvaluationConfig(eval_limit=0)


def test_an_unknown_setting_names_the_near_one_and_all() -> None:
    with pytest.raises(
        UserError, match=r"no setting 'n_samples'; did you mean 'num_samples'\? It has: sparsity, effort, method"
    ):
        from_mapping(PruneConfig, {"n_samples": 4})
    with pytest.raises(
        UserError, match=r"EvaluationConfig has no setting 'colour'\. It has: eval_dataset, eval_tokens"
    ):
        from_mapping(EvaluationConfig, {"colour": 4})
