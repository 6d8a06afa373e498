"""Collectives with gradients. They come into losses as arguments, so that a loss is a pure function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def gather_features(local: Float[Tensor, "b d"], counts: Sequence[int], group: dist.ProcessGroup | None = None) -> Float[Tensor, "B d"]:
    """The rows of all ranks in rank order, with gradients to the rank they came from.

    Args:
        counts: rows of each rank, known to all without a message; they may differ.
    """
    if len(counts) == 1:
        return local
    gathered: Tensor = _Gather.apply(local, list(counts), group)
    return gathered


class _Gather(torch.autograd.Function):
    """Forward: pad to the largest share, all-gather, drop the padding. Backward: sum over ranks what each found for our rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        rank = dist.get_rank(group)
        if local.shape[0] != counts[rank]:
            raise AssertionError(f"rank {rank} has {local.shape[0]} rows, counts say {counts[rank]}")
        ctx.counts, ctx.group = counts, group
        padded = local.new_zeros(max(counts), local.shape[1])
        padded[: local.shape[0]] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        first = sum(ctx.counts[: dist.get_rank(ctx.group)])
        return grad[first : first + ctx.counts[dist.get_rank(ctx.group)]], None, None
