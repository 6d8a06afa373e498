"""The codebook of image tokens: transformers' `FlavaImageCodebook`, the encoder of DALL-E's discrete VAE (Ramesh et al. 2021, arXiv
2102.12092, section 2.1 and appendix A.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from mm_core.config import Config
from mm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import FlavaImageCodebook

CODEBOOK_STRIDE = 8
"""Pixels along a side of what one entry stands for."""
_EPSILON = 0.1
"""Pixels are mapped from [0, 1] to [epsilon, 1 - epsilon], as the logit-Laplace distribution has no mass at the ends (equation 2)."""

_WAY_OUT = "model.codebook_source, or in its place --init, names a bundle of codebook-tiny, a flava model or a hub id"


class CodebookSizes(Config):
    """By default DALL-E's."""

    width: int = Field(default=256, gt=3, description="Channels of the first group; they double in each of the following.")
    blocks_per_group: int = Field(default=2, gt=0)
    entries: int = Field(default=8192, gt=1)


def codebook_settings(sizes: CodebookSizes) -> dict[str, int]:
    """By transformers' names."""
    return {"hidden_size": sizes.width, "num_blocks_per_group": sizes.blocks_per_group, "vocab_size": sizes.entries}


def codebook_pixels(images: UInt8[Tensor, "b h w 3"], size: int) -> Float[Tensor, "b 3 size size"]:
    """What the codebook sees of uint8 pictures, on the device they are on."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-1] != size:
        pixels = functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return (1 - 2 * _EPSILON) * (pixels / 255) + _EPSILON


def codebook_sizes(source: str) -> CodebookSizes:
    """Of the codebook in a folder or at a hub id.

    Raises:
        ConfigError: there is none.
    """
    return _sizes(load_codebook(source))


def load_codebook(source: str) -> FlavaImageCodebook:
    """From a folder or the hub, in fp32: a codebook of its own, or the one that a FLAVA model has.

    Raises:
        ConfigError: there is none, or it lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import FlavaImageCodebook

    from mm_core.models.quiet import quiet

    try:
        with quiet():
            codebook, report = FlavaImageCodebook.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, key_mapping={r"^image_codebook\.": ""}
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ConfigError(f"no codebook at {source} ({reason}): {_WAY_OUT}") from None
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"{source} lacks {len(missing)} tensors of a codebook, {missing[0]} first: {_WAY_OUT}")
    return codebook.requires_grad_(False)


def _sizes(codebook: FlavaImageCodebook) -> CodebookSizes:
    config = codebook.config
    return CodebookSizes(width=config.hidden_size, blocks_per_group=config.num_blocks_per_group, entries=config.vocab_size)


def from_codebook_pixels(pixels: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b h w 3"]:
    """The picture again."""
    shown = (pixels - _EPSILON) / (1 - 2 * _EPSILON)
    return (255 * shown).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
