"""Collectives with gradients. They come into losses as arguments, so that a loss is a pure function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Around = Callable[[], AbstractContextManager[object]]


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


class _Gather(torch.autograd.Function):
    """Shares are padded to the largest, since not every backend takes uneven ones.

    Backward: every rank has a gradient for all rows; a rank gets the sum over ranks of those for its own.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], group: dist.ProcessGroup | None, around: Around) -> Tensor:
        own = counts[dist.get_rank(group)]
        assert local.shape[0] == own, f"{local.shape[0]} rows here, {own} of {counts} announced"
        ctx.counts, ctx.own, ctx.group, ctx.around = counts, own, group, around
        parts = [local.new_empty(max(counts), local.shape[1]) for _ in counts]
        with around():
            dist.all_gather(parts, _pad(local, max(counts)), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        parts = [_pad(part, max(ctx.counts)) for part in grad.split(ctx.counts)]
        summed = torch.empty_like(parts[0])
        with ctx.around():
            dist.reduce_scatter(summed, parts, group=ctx.group)
        return summed[: ctx.own], None, None, None


def _pad(rows: Float[Tensor, "b d"], length: int) -> Float[Tensor, "length d"]:
    return functional.pad(rows, (0, 0, 0, length - rows.shape[0])).contiguous()
