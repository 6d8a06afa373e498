"""What an objective is, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
    measures: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """The same of what is logged beside the losses, accuracies say."""

    @classmethod
    def of(cls, terms: Mapping[str, Tensor], world_size: int, measures: Mapping[str, Tensor] | None = None) -> LossOutput:
        return cls(torch.stack([*terms.values()]).sum() * world_size, dict(terms), dict(measures or {}))


class Objective(Protocol):
    """From one rank's outputs to its share of the global batch's loss."""

    def __call__(self, output: Any, batch: Any, counts: Sequence[int]) -> LossOutput:
        """`counts`: samples of each rank in this step; `batch`: what `output` was made of."""
        ...
