"""Texts that are hard to tell from an image's own: negatives of image-text matching (ALBEF: Li et al. 2021, arXiv 2107.07651, section
3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as a signed number."""


class Negatives(NamedTuple):
    """Of each of b images the text that it is shown with."""

    rows: Int[Tensor, " b"]
    """Of the global batch."""
    found: Bool[Tensor, " b"]
    """False where every text is the image's own, word for word."""


def draw_negatives(
    logits: Float[Tensor, "b n"], own: Int[Tensor, " b"], texts: Int[Tensor, " n"], draws: Float[Tensor, " b"], *, hard: float = 1.0
) -> Negatives:
    """A text per image, by the softmax of its similarities, among those that do not say the same as its own.

    One draw of a sample decides, so that the choice does not depend on how the batch is divided among ranks.

    Args:
        logits: scaled similarities; all equal for a choice at random.
        own: each image's text.
        texts: `text_keys` of the global batch.
        draws: in [0, 1).
        hard: the share that is drawn so; the rest is any other text.
    """
    other = texts[own][:, None] != texts
    found = other.any(dim=1)
    allowed = other | ~found[:, None]
    logits = torch.where(allowed, logits.to(torch.promote_types(logits.dtype, torch.float32)), -torch.inf)
    shares = (hard * logits.softmax(dim=1) + (1 - hard) * allowed / allowed.sum(dim=1, keepdim=True)).cumsum(dim=1)
    rows = torch.searchsorted(shares, draws[:, None].to(shares.dtype) * shares[:, -1:], right=True)
    return Negatives(rows[:, 0].clamp(max=logits.shape[1] - 1), found)


def text_keys(input_ids: Int[Tensor, "n l"]) -> Int[Tensor, " n"]:
    """A 64-bit number of each text, equal where the texts are: comparing each with each needs no more than that."""
    key = torch.zeros_like(input_ids[:, 0])
    for tokens in input_ids.unbind(1):
        key = (key ^ tokens) * _ODD
        key = key ^ (key >> 29)
    return key
