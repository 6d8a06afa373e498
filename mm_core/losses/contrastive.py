"""InfoNCE over the global batch (CLIP: Radford et al. 2021, figure 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def contrastive_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    all_image: Float[Tensor, "B d"],
    all_text: Float[Tensor, "B d"],
    scale: Float[Tensor, ""],
    first: int,
) -> Float[Tensor, ""]:
    """This rank's share of the symmetric cross-entropy: its images against all texts and its texts against all images.

    The sum over ranks is the loss of the whole batch: each share is divided by the global count B, not by its own b.

    Args:
        image, text: this rank's features, L2-normalised.
        all_image, all_text: of all ranks, in rank order; this rank's rows are [first, first + b).
    """
    targets = torch.arange(first, first + image.shape[0], device=image.device)
    rows = functional.cross_entropy(scale * image @ all_text.T, targets, reduction="sum")
    columns = functional.cross_entropy(scale * text @ all_image.T, targets, reduction="sum")
    return (rows + columns) / (2 * all_image.shape[0])
