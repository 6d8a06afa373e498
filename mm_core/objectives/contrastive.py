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

        With one rank and one view this is CLIP's own loss; with several views their mean, as DeCLIP's multi-view supervision of images
        (Li et al. 2021, arXiv 2110.05208). `LossOutput` says how it is scaled with several ranks.
        """
        images, text = output.image_features, output.text_features
        everyone = self._gather(torch.cat([images, text[:, None]], dim=1).flatten(1), counts)
        *all_images, all_text = everyone.unflatten(1, (images.shape[1] + 1, -1)).unbind(1)
        first = sum(counts[: self._rank])
        shares = [
            contrastive_loss(image, text, all_image, all_text, output.logit_scale, first)
            for image, all_image in zip(images.unbind(1), all_images, strict=True)
        ]
        share = torch.stack(shares).mean()
        return LossOutput(total=share * len(counts), terms={"contrastive": share})
