"""InfoNCE over the global batch (CLIP: Radford et al. 2021, figure 3), with label smoothing (ALIGN: Jia et al. 2021) and several texts
of an image."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm_core.losses.blocks import BLOCK_BYTES, rows_per_block, sum_over_rows


def contrastive_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b c d"],
    all_image: Float[Tensor, "B d"],
    all_text: Float[Tensor, "B c d"],
    scale: Float[Tensor, ""],
    first: int,
    *,
    label_smoothing: float = 0.0,
    block_bytes: int = BLOCK_BYTES,
) -> Float[Tensor, ""]:
    """This rank's share of the symmetric cross-entropy: its images against all texts and its texts against all images.

    The sum over ranks is the loss of the whole batch: each share is divided by the global count B, not by its own b. With c texts an
    image's target is spread evenly over its own (Khosla et al. 2020, arXiv 2004.11362, equation 2), and the texts' side is their mean.

    Args:
        image, text: this rank's features, L2-normalised.
        all_image, all_text: of all ranks, in rank order; this rank's rows are [first, first + b).
        label_smoothing: share of the target that is spread over all columns.
        block_bytes: the largest part of the similarity matrix that is held at a time.
    """
    count, captions = text.shape[:2]
    own = torch.arange(first, first + count, device=image.device)
    own_texts = own[:, None] * captions + torch.arange(captions, device=image.device)
    columns = all_text.flatten(0, 1)
    rows = sum_over_rows(
        _cross_entropy, (image, own_texts), (columns, scale, label_smoothing), rows_at_a_time=rows_per_block(columns, block_bytes)
    )
    texts = sum_over_rows(
        _cross_entropy,
        (text.flatten(0, 1), own.repeat_interleave(captions)[:, None]),
        (all_image, scale, label_smoothing),
        rows_at_a_time=rows_per_block(all_image, block_bytes),
    )
    return (rows + texts / captions) / (2 * all_image.shape[0])


def _cross_entropy(
    rows: Float[Tensor, "r d"], targets: Int[Tensor, "r p"], columns: Float[Tensor, "n d"], scale: Float[Tensor, ""], smoothing: float
) -> Float[Tensor, ""]:
    """Of each row against the even spread over its p targets."""
    logits = scale * rows @ columns.T
    wanted = logits.gather(1, targets).mean(dim=1)
    if smoothing:
        wanted = (1 - smoothing) * wanted + smoothing * logits.mean(dim=1)
    return (logits.logsumexp(dim=1) - wanted).sum()
