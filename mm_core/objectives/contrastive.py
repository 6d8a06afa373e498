"""The contrastive objective of CLIP over the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm_core.distributed import gather_features
from mm_core.losses.contrastive import contrastive_loss
from mm_core.models.clip import TwoTowerOutput
from mm_core.objectives.output import LossOutput

Gather = Callable[[Tensor, Sequence[int]], Tensor]


class ContrastiveObjective:
    """InfoNCE with the features of all ranks, gradients flowing back to each."""

    def __init__(self, *, rank: int = 0, gather: Gather = gather_features) -> None:
        self._rank, self._gather = rank, gather

    def __call__(self, output: TwoTowerOutput, counts: Sequence[int]) -> LossOutput:
        """`counts`: samples of each rank in this step. One gather serves both modalities.

        With one rank this is CLIP's own loss; `LossOutput` says how it is scaled with several.
        """
        both = torch.cat([output.image_features, output.text_features], dim=1)
        all_image, all_text = self._gather(both, counts).chunk(2, dim=1)
        share = contrastive_loss(
            output.image_features, output.text_features, all_image, all_text, output.logit_scale, sum(counts[: self._rank])
        )
        return LossOutput(total=share * len(counts), terms={"contrastive": share})
