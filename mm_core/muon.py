"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the momentum of a matrix, orthogonalised, is its update.

Only a whole matrix can be orthogonalised, and each costs as much as some samples do. So the matrices are dealt out to the ranks: each
orthogonalises its share, stacked by shape, and sends back what the others need. The result does not depend on how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic; after five rounds singular values lie between about 0.7 and 1.2."""
_ROUNDS = 5
_RMS = 0.2
"""Root mean square of an update of AdamW, as measured by Liu et al. 2025 (arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Muon for some matrices, and AdamW for all else, as one optimiser: one state, one list of groups, one learning rate.

    Updates of matrices are scaled to the size that AdamW's have, so that both take the same rate and weight decay (Liu et al. 2025).
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: torch.optim.AdamW, *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        """
        Args:
            matrices: 2-D; whole and the same on every rank, or sharded along their rows.
            others: of the other parameters. It works on this optimiser's state and groups from here on.
        """
        self._others = others
        own = {"params": [*matrices], "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([own, *others.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever given
        """A collective where there are several ranks."""
        assert closure is None
        own, *self._others.param_groups = self.param_groups
        self._others.state = self.state
        self._others.step()
        parameters = sorted((p for p in own["params"] if p.grad is not None), key=_kind)
        for _, equal in groupby(parameters, key=_kind):
            self._update([*equal], own)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Of parameters of one shape."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [_local(p.grad) for p in parameters]
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = orthogonalised_over_ranks(torch._foreach_lerp(gradients, momenta, group["momentum"]), parameters[0])
        size = _RMS * math.sqrt(max(parameters[0].shape))
        weights = [_local(p) for p in parameters]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"] * size)


def _kind(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.shape)


def _local(tensor: Any) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalise(matrices: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """The nearest matrices whose singular values are all about 1, by Newton-Schulz iteration, in bf16, which is exact enough for them
    (double stays double). Zeros stay zeros."""
    x = matrices if matrices.dtype is torch.float64 else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalised_over_ranks(updates: Sequence[Tensor], like: nn.Parameter) -> list[Tensor]:
    """What each rank holds of the orthogonalised matrices, from what it holds of the matrices.

    Args:
        updates: of equal shapes; of a sharded parameter this rank's rows.
        like: a parameter that is divided as the matrices are.
    """
    stack = torch.stack([*updates])
    stack = stack if stack.dtype is torch.float64 else stack.bfloat16()  # on the way too
    if isinstance(like, DTensor):
        return [*_of_rows(stack, like.shape[0], like.device_mesh.get_group())]
    if dist.is_initialized() and dist.get_world_size() > 1:
        return [*_of_copies(stack)]
    return [*orthogonalise(stack)]


def _of_copies(matrices: Float[Tensor, "k m n"]) -> Float[Tensor, "k m n"]:
    """Every rank has all matrices: it orthogonalises its share, and gets the others'."""
    ranks, count = dist.get_world_size(), len(matrices)
    share = -(-count // ranks)
    own = orthogonalise(_pad(matrices, 0, share * ranks).unflatten(0, (ranks, share))[dist.get_rank()]).contiguous()
    everyone = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(everyone, own)
    return torch.cat(everyone)[:count]


def _of_rows(rows: Float[Tensor, "k r n"], height: int, group: dist.ProcessGroup) -> Float[Tensor, "k r n"]:
    """Every rank has some rows of all matrices: it gets the whole of its share of them, and hands their rows back."""
    ranks, count, held = dist.get_world_size(group), *rows.shape[:2]
    share, most = -(-count // ranks), -(-height // ranks)  # the last ranks may hold fewer rows, or none
    sent = _pad(_pad(rows, 0, share * ranks), 1, most).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    whole = received.unflatten(0, (ranks, share)).transpose(0, 1).flatten(1, 2)[:, :height]
    done = _pad(orthogonalise(whole), 1, ranks * most).unflatten(1, (ranks, most)).transpose(0, 1).flatten(0, 1)
    dist.all_to_all_single(received, done.contiguous(), group=group)
    return received[:count, :held]


def _pad(tensor: Tensor, axis: int, length: int) -> Tensor:
    """With zeros behind, up to `length`."""
    missing = list(tensor.shape)
    missing[axis] = length - missing[axis]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim=axis) if missing[axis] else tensor
