"""The gather on real gloo processes: any shares, values and gradients, and a group that is not everyone."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mm_core.distributed import gather_features

DIM = 3


def rows_of(rank: int, count: int) -> torch.Tensor:
    return torch.randn(count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()


def weigh(rank: int, gathered: torch.Tensor) -> torch.Tensor:
    """A loss that differs from rank to rank, and in which no row weighs as another."""
    return (gathered**2 * torch.arange(1, gathered.numel() + 1, dtype=torch.float64).view_as(gathered)).sum() * (rank + 1)


def _worker(rank: int, counts: list[int], outsiders: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(counts) + outsiders, timeout=timedelta(seconds=60)
    )
    group = dist.new_group(list(range(len(counts))))
    if rank < len(counts):
        local = rows_of(rank, counts[rank])
        gathered = gather_features(local, counts, group)
        weigh(rank, gathered).backward()
        torch.save((gathered.detach(), local.grad), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("counts", "outsiders"), [([2, 0, 3], 0), ([1, 4], 1)], ids=["empty share", "group of two in three"])
def test_every_rank_gets_all_rows_and_the_sum_of_gradients(counts: list[int], outsiders: int, tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["mm_core.objectives.contrastive", "transformers.models.clip.modeling_clip"])
    arguments = (counts, outsiders, str(tmp_path / "rendezvous"), str(tmp_path))
    mp.start_processes(_worker, arguments, nprocs=len(counts) + outsiders, start_method="forkserver")

    shares = [rows_of(rank, count) for rank, count in enumerate(counts)]
    everything = torch.cat(shares)
    sum(weigh(rank, everything) for rank in range(len(counts))).backward()  # type: ignore[union-attr]
    for rank, share in enumerate(shares):
        gathered, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(gathered, everything.detach(), rtol=0, atol=0)
        torch.testing.assert_close(gradient, share.grad, rtol=1e-12, atol=0)


def test_one_rank_alone_needs_no_process_group() -> None:
    local = rows_of(0, 4)
    assert gather_features(local, [4]) is local
