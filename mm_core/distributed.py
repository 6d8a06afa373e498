"""Collectives with gradients. They come into losses as arguments, so that a loss is a pure function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Around = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class GlobalBatch:
    """How the ranks divide a batch: the samples of each, in rank order, and which of them this one is."""

    counts: tuple[int, ...]
    rank: int = 0

    @property
    def first(self) -> int:
        """This rank's first sample in the whole."""
        return sum(self.counts[: self.rank])

    @property
    def is_divided(self) -> bool:
        return len(self.counts) > 1


def gather_features(
    local: Float[Tensor, "b d"], counts: Sequence[int], group: dist.ProcessGroup | None = None, *, around: Around = nullcontext
) -> Float[Tensor, "B d"]:
    """The rows of all ranks in rank order, with gradients to the rank they came from. One rank alone gets its own rows back.

    Args:
        counts: rows of each rank, known to all without a message; they may differ.
        around: entered for the messages, forward and backward; for a clock.
    """
    if len(counts) == 1:
        return local
    gathered: Tensor = _Gather.apply(local, list(counts), group, around)
    return gathered


@torch.no_grad()
def gather_rows(local: Shaped[Tensor, "b ..."], counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Shaped[Tensor, "B ..."]:
    """The rows of all ranks in rank order, of any type, without gradients. Shares are padded to the largest, since not every backend takes
    uneven ones."""
    if len(counts) == 1:
        return local
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_over_ranks(values: Float[Tensor, " n"], whole: GlobalBatch, *, around: Around = nullcontext) -> Float[Tensor, " n"]:
    """Without gradients; of one rank alone its own."""
    if whole.is_divided:
        with around():
            dist.all_reduce(values)
    return values


class _Gather(torch.autograd.Function):
    """Backward: every rank has a gradient for all rows; a rank gets the sum over ranks of those for its own."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], group: dist.ProcessGroup | None, around: Around) -> Tensor:
        own = counts[dist.get_rank(group)]
        assert local.shape[0] == own, f"{local.shape[0]} rows here, {own} of {counts} announced"
        ctx.counts, ctx.own, ctx.group, ctx.around = counts, own, group, around
        with around():
            return gather_rows(local, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        parts = [_pad(part, max(ctx.counts)) for part in grad.split(ctx.counts)]
        summed = torch.empty_like(parts[0])
        with ctx.around():
            dist.reduce_scatter(summed, parts, group=ctx.group)
        return summed[: ctx.own], None, None, None


def exchange_in_ring(
    own: Float[Tensor, "b d"],
    visit: Callable[[Tensor, bool], Tensor],
    *,
    counts: Sequence[int],
    group: dist.ProcessGroup | None = None,
    around: Around = nullcontext,
) -> Float[Tensor, "b d"]:
    """Show every rank's rows to every rank, one block at a time, and bring home the sum of what `visit` returned for the own ones.

    Blocks go from each rank to the next, with what was added up for them so far. A rank holds its own, one of another rank's, and the next
    one as it comes.

    Args:
        visit: of a block, and whether it is the rank's own, to a tensor of the block's shape.
        counts: rows of each rank; they may differ.
        around: entered for the messages; for a clock.
    """
    sums = visit(own, True)
    if len(counts) == 1:
        return sums
    rank, ranks, block = dist.get_rank(group), len(counts), own
    for hop in range(1, ranks):
        with around():
            carried = _to_next(_pad(torch.cat([block, sums], dim=1), max(counts)), group)
        block, sums = carried[: counts[(rank - hop) % ranks]].chunk(2, dim=1)
        sums = sums + visit(block, False)
    with around():
        return _to_next(_pad(sums, max(counts)), group)[: counts[rank]]


def _to_next(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Send to the next rank of the ring, and return what the one before sent."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = ((rank + step) % ranks for step in (1, -1))
    if group is not None:
        after, before = (dist.get_global_rank(group, peer) for peer in (after, before))
    received = torch.empty_like(rows)
    for request in dist.batch_isend_irecv([dist.P2POp(dist.isend, rows, after, group), dist.P2POp(dist.irecv, received, before, group)]):
        request.wait()
    return received


def _pad(rows: Float[Tensor, "b d"], length: int) -> Float[Tensor, "length d"]:
    return functional.pad(rows, (0, 0, 0, length - rows.shape[0])).contiguous()
