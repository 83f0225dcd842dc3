"""Hidden states in mapped files: the same bits, and nothing that stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmprune.walk.mapped import mapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_tensor_has_the_same_bits_and_its_file_no_name(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    found = mapped(tensor, tmp_path)
    assert torch.equal(found, tensor)
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert not list(tmp_path.iterdir())


def test_what_is_mapped_can_be_written_to(tmp_path: Path) -> None:
    found = mapped(torch.zeros(4), tmp_path)
    found += 1
    assert torch.equal(found, torch.ones(4))
