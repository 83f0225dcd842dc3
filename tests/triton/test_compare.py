"""The measure that all kernel tests rest on must itself be able to fail."""

from __future__ import annotations

import pytest
import torch

from llmprune.triton_kernels.testing.compare import assert_close, difference


def test_errors_are_relative_to_the_size_of_the_truth() -> None:
    truth = torch.full((4, 5), 200.0, dtype=torch.float64)
    actual = truth.clone()
    actual[2, 3] += 2
    found = difference(actual, truth)
    assert found.max_error == pytest.approx(0.01)
    assert found.rms_error == pytest.approx(0.01 / 20**0.5)
    assert found.worst == ("at (2, 3): got 202, expected 200",)


def test_memory_that_was_never_written_is_told_first() -> None:
    actual = torch.ones(3, 3)
    actual[1, 2] = torch.nan
    with pytest.raises(AssertionError, match=r"max error inf(.|\n)*at \(1, 2\): got nan, expected 1\n"):
        assert_close(actual, torch.ones(3, 3), max_error=1e9)


def test_many_small_errors_are_noticed_where_no_single_one_is() -> None:
    truth = torch.ones(1000)
    assert_close(truth * 1.0001, truth, max_error=1e-2)
    with pytest.raises(AssertionError, match=r"allowed: max 0\.01, rms 0\.0025"):
        assert_close(truth * 1.008, truth, max_error=1e-2)


def test_shapes_must_agree_and_may_be_empty() -> None:
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3), max_error=0)
    with pytest.raises(ValueError, match=r"got \(2, 3\), expected \(3, 2\)"):
        difference(torch.zeros(2, 3), torch.zeros(3, 2))
