"""What an objective returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """`total` is back-propagated; each of `terms` is logged under its name."""

    total: Float[Tensor, ""]
    """This rank's share times the world size, so that the mean over ranks, which DDP takes of gradients, is the whole batch's."""
    terms: dict[str, Float[Tensor, ""]]
    """This rank's share of each weighted term: the sum over ranks is the whole batch's."""

    @classmethod
    def of(cls, terms: Mapping[str, Tensor], world_size: int) -> LossOutput:
        return cls(torch.stack([*terms.values()]).sum() * world_size, dict(terms))
