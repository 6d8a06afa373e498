"""Triplet loss with semi-hard mining (FaceNet: Schroff et al. 2015, arXiv 1503.03832, section 3.2) between images and texts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm_core.losses.blocks import BLOCK_BYTES, rows_per_block, sum_over_rows


def triplet_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b c d"],
    all_image: Float[Tensor, "B d"],
    all_text: Float[Tensor, "B c d"],
    first: int,
    *,
    margin: float,
    block_bytes: int = BLOCK_BYTES,
) -> Float[Tensor, ""]:
    """This rank's share of the mean of max(0, d(a, p) - d(a, n) + margin) over both directions, d the squared distance of unit vectors.

    Every pair of an image and one of its texts gives two anchors. An anchor's negative is the nearest of those farther away than its
    positive; where there is none, the farthest of all. A batch of one image has no negative and no loss. The arguments are as in
    `contrastive_loss`.
    """
    count, captions = text.shape[:2]
    owners = torch.arange(first, first + count, device=image.device).repeat_interleave(captions)
    flat = text.flatten(0, 1)
    images = image.repeat_interleave(captions, dim=0)
    columns = all_text.flatten(0, 1)
    text_owners = torch.arange(all_image.shape[0], device=image.device).repeat_interleave(captions)
    anchors = sum_over_rows(
        _semi_hard, (images, flat, owners), (columns, text_owners, margin), rows_at_a_time=rows_per_block(columns, block_bytes)
    )
    others = sum_over_rows(
        _semi_hard,
        (flat, images, owners),
        (all_image, text_owners[::captions], margin),
        rows_at_a_time=rows_per_block(all_image, block_bytes),
    )
    return (anchors + others) / (2 * captions * all_image.shape[0])


def _semi_hard(
    anchors: Float[Tensor, "r d"],
    positives: Float[Tensor, "r d"],
    owners: Int[Tensor, " r"],
    columns: Float[Tensor, "n d"],
    column_owners: Int[Tensor, " n"],
    margin: float,
) -> Float[Tensor, ""]:
    """d(a, b) = 2 - 2 a·b, so near is a large product."""
    near = (anchors * positives).sum(dim=1, keepdim=True)
    products = anchors @ columns.T
    own = owners[:, None] == column_owners
    semi_hard = products.masked_fill(own | (products >= near), -torch.inf).amax(dim=1, keepdim=True)
    farthest = products.masked_fill(own, torch.inf).amin(dim=1, keepdim=True)
    negative = torch.where(semi_hard.isfinite(), semi_hard, farthest)
    losses = (2 * (negative - near) + margin).relu()
    return torch.where(negative.isfinite(), losses, torch.zeros_like(losses)).sum()
