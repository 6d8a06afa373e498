"""What an objective returns."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """`total` is back-propagated; each of `terms` is logged under its name."""

    total: Float[Tensor, ""]
    """This rank's share times the world size, so that the mean over ranks, which DDP takes of gradients, is the whole batch's."""
    terms: dict[str, Float[Tensor, ""]]
    """This rank's share of each weighted term: the sum over ranks is the whole batch's."""
