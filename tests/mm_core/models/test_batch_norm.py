"""Beside torch's own batch normalisation, on one rank. test_gradients.py has several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_core.models.batch_norm import StatisticsUntouched, synchronise_batch_norms


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pair() -> tuple[nn.Module, nn.Module]:
    """torch's, and the same synchronised."""
    norms = nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)
    for norm in norms:
        torch.manual_seed(0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    synchronise_batch_norms(norms[1])
    return norms


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of different means."""
    noise = torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    return (noise + torch.tensor([0.0, 1, -4, 20]).view(-1, 1, 1)).to(dtype).requires_grad_()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_own(dtype: torch.dtype) -> None:
    theirs, ours = pair()
    one, other = images(dtype), images(dtype)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    expected, found = theirs(one), ours(other)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-4, atol=1e-4)
    direction = torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    for output in (expected, found):
        (output * direction).sum().backward()
    torch.testing.assert_close(other.grad, one.grad, **close)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-2, atol=10 * close["atol"])


def test_in_evaluation_nothing_is_asked_of_other_ranks() -> None:
    theirs, ours = (norm.eval() for norm in pair())
    torch.testing.assert_close(ours(images()), theirs(images()))


def test_a_second_pass_can_leave_the_statistics_alone() -> None:
    norm, _ = pair()
    norm(images())
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with StatisticsUntouched(norm):
        norm(images() + 1)
    torch.testing.assert_close(dict(norm.named_buffers()), before, rtol=0, atol=0)
    norm(images() + 1)
    assert int(norm.num_batches_tracked) == 2
