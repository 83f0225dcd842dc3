"""What a team does together, and that a process alone does none of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from llmprune.distributed import Team, team_from_environment
from llmprune.errors import UserError
from tests.distributed.processes import together


def _collectives() -> None:
    """Run in three processes."""
    before = signal.getsignal(signal.SIGTERM)
    with team_from_environment() as team:
        rank, alike = team.rank, torch.arange(6.0).view(2, 3)
        strip = alike.clone()
        team.add(strip[:, 1:])  # not contiguous: what lies beside it stays
        assert strip.tolist() == [[0, 3, 6], [3, 12, 15]]
        assert team.pooled(torch.tensor([rank, 2**40])).tolist() == [3, 3 * 2**40]
        assert team.total(0.5, 2**50 + 1) == [1.5, 3 * (2**50 + 1)]
        assert team.least(5 - rank) == 3
        assert team.first(None if rank == 0 else float(rank), 3.0 + rank, None) == [1.0, 3.0, None]
        assert [list(team.share(count)) for count in (7, 2)] == [
            [[0, 1], [2, 3], [4, 5, 6]][rank],
            [[], [0], [1]][rank],
        ]
        assert team.decided(lambda: {"rank": rank}) == {"rank": 0}
        for whole in (torch.full((5, 2), rank), torch.full((5, 2), rank == 1)):
            team.exchange(whole, [(0, 2), (2, 2), (2, 5)])
            assert whole[:, 0].tolist() == ([0, 0, 2, 2, 2] if whole.dtype != torch.bool else [False] * 5)
        sent = torch.full((3, 2), float(rank), dtype=torch.bfloat16).T
        team.send(sent)
        assert not sent.any()
        with pytest.raises(UserError, match="of rank 0"):
            team.decided(_refuse)
    assert signal.getsignal(signal.SIGTERM) is before


def _refuse() -> None:
    raise UserError("an error of rank 0, which all get")


def test_three_processes_exchange_what_they_should(tmp_path: Path) -> None:
    together(3, _collectives, log=tmp_path / "log")


def test_a_process_alone_shares_nothing_and_changes_nothing() -> None:
    with team_from_environment() as team:
        assert (team.rank, team.size, team.leads, list(team.share(3))) == (0, 1, True, [0, 1, 2])
        tensor = torch.ones(2)
        team.add(tensor)
        team.send(tensor)
        team.exchange(tensor.view(2, 1), [(0, 2)])
        assert team.pooled(tensor) is tensor
        assert tensor.tolist() == [1, 1]
        assert (team.total(1, 2), team.least(4), team.first(None, 2.0)) == ([1, 2], 4, [None, 2.0])
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", range(9))
def test_shares_cover_everything_once(count: int) -> None:
    for size in range(1, 6):
        teams = [Team() for _ in range(size)]
        for rank, team in enumerate(teams):
            team.rank, team.size = rank, size
        assert [index for team in teams for index in team.share(count)] == list(range(count))
