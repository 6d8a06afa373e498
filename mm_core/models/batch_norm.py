"""Batch normalisation over the batch of all ranks: the same features, gradients and running statistics on any number of them.

torch's SyncBatchNorm computes the same, but refuses CPUs, where it would have to be tested.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def synchronise_batch_norms(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """From now on they normalise over the samples of all ranks, which may have unequally many. Names of parameters and buffers stay."""
    for norm in batch_norms(model):
        norm.forward = partial(_normalised, norm, group=group)  # type: ignore[method-assign]


class StatisticsUntouched:
    """Within, a forward pass leaves the running statistics as they are: it is a second one over the same samples. It works on copies, so
    that it is the first one operation by operation, as checkpointing asks. May be entered again: a graph may be gone through twice."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = batch_norms(model)

    def __enter__(self) -> None:
        self._kept = [(norm, norm._buffers) for norm in self._norms]
        for norm, buffers in self._kept:
            norm._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}

    def __exit__(self, *_: object) -> None:
        for norm, buffers in self._kept:
            norm._buffers = buffers


def _normalised(norm: nn.modules.batchnorm._BatchNorm, x: Float[Tensor, "b c *n"], *, group: dist.ProcessGroup | None) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    mean, variance, count = _GlobalMoments.apply(x, group)
    _track(norm, mean, variance, count)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    per_channel = (-1, *(1 for _ in x.shape[2:]))
    return (x * scale.view(per_channel) + shift.view(per_channel)).to(x.dtype)


@torch.no_grad()
def _track(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """As torch's own: a running mean of the unbiased variance."""
    assert norm.running_mean is not None, "no model here is without running statistics"
    assert norm.running_var is not None, "no model here is without running statistics"
    assert norm.num_batches_tracked is not None, "no model here is without running statistics"
    assert norm.momentum is not None, "no model here has them as a cumulative mean"
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), norm.momentum)


class _GlobalMoments(torch.autograd.Function):
    """Mean, biased variance and number of the values of each channel, over all ranks; in fp32 at least. One message each way.

    Of what each rank r has, nᵣ, μᵣ and vᵣ: μ = Σ nᵣμᵣ / n and v = Σ nᵣ(vᵣ + (μᵣ - μ)²) / n, which loses no digits as sums of squares do.
    Backward: dL/dx = (Σ dL/dμ + 2 (x - μ) Σ dL/dv) / n, sums over ranks, each of which has a loss that reads both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own_variance, own_mean = torch.var_mean(wide, dim=[0, *range(2, x.ndim)], correction=0)
        own_count = own_mean.new_full((1,), x.numel() // x.shape[1])
        own = torch.cat([own_count, own_mean, own_variance])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        counts, means, variances = torch.stack(parts).split([1, x.shape[1], x.shape[1]], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, mean, count)
        ctx.group = group
        ctx.mark_non_differentiable(count)
        return mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, mean, count = ctx.saved_tensors
        summed = torch.stack([grad_mean, grad_variance])
        dist.all_reduce(summed, group=ctx.group)
        grad_mean, grad_variance = (summed / count).view(2, 1, -1, *(1 for _ in x.shape[2:]))
        centred = x - mean.view(grad_mean.shape)
        return (grad_mean + 2 * grad_variance * centred).to(x.dtype), None
