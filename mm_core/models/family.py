"""The families of two-tower models: one configuration type each, and what builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.siglip import SiglipConfig, build_siglip
from mm_core.models.sizes import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelConfig = Annotated[ClipConfig | SiglipConfig, Field(discriminator="family")]


def build_model(config: ModelConfig, tokens: SpecialTokens) -> PreTrainedModel:
    """transformers' class of the family, with fresh weights.

    Raises:
        ConfigError: sizes that do not fit one another or the tokenizer.
    """
    match config:
        case ClipConfig():
            return build_clip(config, tokens)
        case SiglipConfig():
            return build_siglip(config, tokens)


def parameter_count(config: ModelConfig) -> int:
    """Counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config, SpecialTokens(bos=0, eos=config.vocab_size - 1, pad=1)).parameters())
