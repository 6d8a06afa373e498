"""What is hidden of a sample for a model to predict: blocks of an image's patches, whole words of a text.

Guarantees: a mask depends on the sample's seed alone, so that whoever reads a sample, on any number of workers, hides the same of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32
from pydantic import Field

from mm_core.config import Config
from mm_core.data.permutation import U64, mix

_BLOCK, _WORD, _REPLACE, _OTHER = 1, 2, 3, 4
"""Keep the draws of a sample apart."""
_ROUNDS, _FAILURES = 200, 10
"""Blocks that are tried for an image, and failures in a row after which it has enough (BEiT's ten)."""


class MaskingConfig(Config):
    """How much is hidden. By default BEiT's blocks (Bao et al. 2021, arXiv 2106.08254, algorithm 1) and BERT's words (Devlin et al. 2018,
    arXiv 1810.04805, section 3.1), as FLAVA has them."""

    image_share: float = Field(default=0.4, gt=0, lt=1, description="Share of an image's patches, at most.")
    min_block: int = Field(default=16, ge=1, description="Patches of a block, at least.")
    min_aspect: float = Field(default=0.3, gt=0, le=1, description="Height over width of a block, at least; at most its inverse.")
    text_share: float = Field(default=0.15, gt=0, lt=1, description="Share of a text's tokens, rounded up to whole words.")
    replaced_by_mask: float = Field(default=0.8, ge=0, le=1, description="Share of the hidden tokens that become the mask token.")
    replaced_by_other: float = Field(default=0.1, ge=0, le=1, description="Share that becomes any other token; the rest stays as it is.")


@dataclass(frozen=True)
class Masking:
    """The settings and what they apply to."""

    config: MaskingConfig
    grid: int
    """Patches along an image's side."""
    mask_id: int
    pad_id: int
    vocab_size: int

    def images(self, seeds: U64) -> Bool[np.ndarray, "b n"]:
        return block_masks(seeds, self.grid, self.config).reshape(len(seeds), self.grid**2)

    def texts(self, input_ids: Int32[np.ndarray, "b l"], words: Int32[np.ndarray, "b l"], seeds: U64) -> MaskedWords:
        return mask_words(input_ids, words, seeds, self)


def uniform(*words: int | U64) -> Float[np.ndarray, ...]:
    """In [0, 1), a pure function of the words."""
    return (mix(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def block_masks(seeds: U64, grid: int, config: MaskingConfig) -> Bool[np.ndarray, "b grid grid"]:
    """Random rectangles, each of which hides something new and no more than is left to hide, until the share is reached. One patch at
    least is hidden, and one is not."""
    limit = min(max(1, int(config.image_share * grid**2)), grid**2 - 1)
    least = min(config.min_block, limit)
    masks = np.zeros((len(seeds), grid, grid), dtype=bool)
    left = np.full(len(seeds), limit)
    failures = np.zeros(len(seeds), dtype=np.int64)
    places = np.arange(grid)
    for number in range(_ROUNDS):
        active = np.flatnonzero((left > 0) & (failures < _FAILURES))
        if not len(active):
            break
        area, shape, top, side = (uniform(seeds[active], _BLOCK, number, draw) for draw in range(4))
        wanted = least + area * (np.maximum(left[active], least) - least)
        aspect = np.exp((2 * shape - 1) * np.log(1 / config.min_aspect))
        height = np.clip(np.rint(np.sqrt(wanted * aspect)), 1, grid).astype(np.int64)
        width = np.clip(np.rint(np.sqrt(wanted / aspect)), 1, grid).astype(np.int64)
        first_row = (top * (grid - height + 1)).astype(np.int64)[:, None]
        first_column = (side * (grid - width + 1)).astype(np.int64)[:, None]
        rows = (places >= first_row) & (places < first_row + height[:, None])
        columns = (places >= first_column) & (places < first_column + width[:, None])
        new = rows[:, :, None] & columns[:, None, :] & ~masks[active]
        sizes = new.sum(axis=(1, 2))
        fits = (sizes > 0) & (sizes <= left[active])
        masks[active[fits]] |= new[fits]
        left[active] -= np.where(fits, sizes, 0)
        failures[active] = np.where(fits, 0, failures[active] + 1)
    _hide_something(masks, seeds)
    return masks


def _hide_something(masks: Bool[np.ndarray, "b grid grid"], seeds: U64) -> None:
    """Of an image that every block was too large for, one patch. In place."""
    flat = masks.reshape(len(masks), masks.shape[1] ** 2)
    bare = np.flatnonzero(~flat.any(axis=1))
    flat[bare, (uniform(seeds[bare], _BLOCK) * flat.shape[1]).astype(np.int64)] = True


class MaskedWords(NamedTuple):
    """Texts with hidden words."""

    input_ids: Int32[np.ndarray, "b l"]
    hidden: Bool[np.ndarray, "b l"]
    """The tokens to predict."""


def mask_words(input_ids: Int32[np.ndarray, "b l"], words: Int32[np.ndarray, "b l"], seeds: U64, masking: Masking) -> MaskedWords:
    """Words at random until they are the share of the text's tokens, one word at least; each with all its tokens.

    Args:
        words: number of the word in its text that each token is of; -1 of marks and padding.
    """
    config = masking.config
    is_word = words >= 0
    order = np.where(is_word, uniform(seeds[:, None], _WORD, words.astype(np.uint64)), np.inf)
    before = (order[:, None, :] < order[:, :, None]).sum(axis=2)
    hidden = is_word & (before < np.maximum(1, np.rint(config.text_share * is_word.sum(axis=1)))[:, None])
    places = np.arange(words.shape[1], dtype=np.uint64)
    draw = uniform(seeds[:, None], _REPLACE, places)
    other = (uniform(seeds[:, None], _OTHER, places) * masking.vocab_size).astype(np.int32)
    other = np.where(other == masking.pad_id, masking.mask_id, other)
    masked = np.where(hidden & (draw < config.replaced_by_mask), masking.mask_id, input_ids)
    replaced = (draw >= config.replaced_by_mask) & (draw < config.replaced_by_mask + config.replaced_by_other)
    return MaskedWords(np.where(hidden & replaced, other, masked).astype(np.int32), hidden)
