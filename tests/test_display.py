"""What a person sees on a terminal while a job runs."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
from llmprune.checkpoint.convert import Conversion
from llmprune.display import observer_for, show_conversion, show_result
from tests.builders import tiny_model


class Screen(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    return Screen()


def test_the_screen_is_ours_only_while_there_is_a_bar(screen: Screen) -> None:
    """At all other times it is for the bars of downloads and uploads, which would be broken into lines."""
    with redirect_stderr(screen):
        with observer_for(quiet=False) as observer:
            observer.stage("evaluate dense")
            assert sys.stderr is screen
            observer.evaluated(1, 2)
            assert sys.stderr is not screen
            observer.evaluated(2, 2)
            assert sys.stderr is screen
            observer.stage("prune")
            observer.start(3)
            assert sys.stderr is not screen
            observer.stage("push")
            assert sys.stderr is screen
            observer.evaluated(1, 2)
        assert sys.stderr is screen


def test_the_bar_is_seen_while_others_are_kept_quiet(screen: Screen) -> None:
    with redirect_stderr(screen), observer_for(quiet=False) as observer, redirect_stderr(io.StringIO()) as quiet:
        observer.evaluated(1, 2)
        observer.evaluated(2, 2)
    assert "measured" in screen.getvalue()
    assert quiet.getvalue() == ""


def test_on_a_terminal_lines_end_between_words_and_in_a_file_they_go_on(screen: Screen) -> None:
    sentence = " ".join(["sentence"] * 12)
    with redirect_stderr(screen), observer_for(quiet=False) as observer:
        observer.say(sentence)
    assert set(screen.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").split()) == {"sentence"}
    with redirect_stderr(io.StringIO()) as file, observer_for(quiet=False) as observer:
        observer.say(sentence)
    assert file.getvalue() == f"  {sentence}\n"


def test_a_run_that_left_all_dense_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    settings: dict[str, Any] = {"method": "wanda", "overrides": {f"layers.{index}.": "dense" for index in range(2)}}
    ids = torch.randint(3, 64, (2, 8))
    show_result(llmprune.prune(model, dataset=ids, **settings))
    assert "0 weights to 2:4" in capsys.readouterr().out


def test_what_a_conversion_could_not_do_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_conversion(Conversion(Path("packed"), 10, 5, 1, {"2:4": 1}, ("no page",)), "packed")
    assert capsys.readouterr().out.endswith("note: no page\n")
