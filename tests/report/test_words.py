"""Numbers as people read them."""

from __future__ import annotations

import pytest

from llmprune.report.words import as_bytes, as_count, as_duration, as_figure


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (16.1284, 4, "16.13"),
        (0.2, 3, "0.200"),
        (9.996, 3, "10.0"),
        (1705.4, 4, "1,705"),
        (0.00012345, 2, "0.00012"),
        (3e-6, 2, "3.0e-06"),
        (2.5e7, 3, "2.50e+07"),
        (0.0, 4, "0"),
        (float("inf"), 4, "inf"),
        (None, 4, "n/a"),
    ],
)
def test_figures_keep_their_digits(value: float | None, digits: int, expected: str) -> None:
    assert as_figure(value, digits) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.04, "0.0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert as_duration(seconds) == expected


def test_sizes_and_counts() -> None:
    assert (as_bytes(538_090_408), as_bytes(8_030_000_000), as_bytes(512)) == ("538 MB", "8.03 GB", "0.0 MB")
    assert (as_count(134_515_008), as_count(1_611_000_000), as_count(999)) == ("134.5 M", "1.611 B", "999")
