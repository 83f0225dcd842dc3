"""What a machine has free, and where a whole model is put."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmprune import machine
from llmprune.machine import free_bytes, placed

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def test_what_torch_holds_in_reserve_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GB, 30 are free for others; torch has taken 50 and uses 10 of them."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert free_bytes(torch.device("cuda")) == 70


@pytest.mark.parametrize(
    ("free", "beside", "fits"), [(1000, 0, True), (499, 0, False), (1000, 401, False), (1000, 399, True)]
)
def test_a_model_goes_where_there_is_room_for_it_and_for_what_comes_beside(
    free: int, beside: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 400 bytes, and a fifth of the memory is spared."""
    monkeypatch.setattr(machine, "free_bytes", lambda device: free)
    model = nn.Linear(10, 10, bias=False)
    moves: list[torch.device] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(device) or self)
    with placed(model, ELSEWHERE, beside=beside) as there:
        assert there == fits
    assert moves == ([ELSEWHERE, CPU] if fits else [])


def test_a_model_that_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 0)
    with placed(nn.Linear(10, 10), CPU) as there:
        assert there


def test_a_model_comes_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10**6)
    model, moves = nn.Linear(4, 4), list[torch.device]()
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moves.append(device) or self)
    with pytest.raises(KeyError), placed(model, ELSEWHERE):
        raise KeyError
    assert moves == [ELSEWHERE, CPU]
