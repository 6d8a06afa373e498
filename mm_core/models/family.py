"""The families of models: one configuration type each, and what builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mm_core.models.align import AlignConfig, build_align
from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.dual import DualConfig, build_dual, resolve_dual
from mm_core.models.dvae import DvaeConfig, build_codebook
from mm_core.models.flava import FlavaConfig, build_flava, resolve_flava
from mm_core.models.siglip import SiglipConfig, build_siglip
from mm_core.models.sizes import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelConfig = ClipConfig | SiglipConfig | AlignConfig | DualConfig | FlavaConfig
"""Of models that put images and texts into one space."""
AnyModelConfig = Annotated[ModelConfig | DvaeConfig, Field(discriminator="family")]


def resolved(config: AnyModelConfig) -> AnyModelConfig:
    """The same with what its sources decide, if it has some.

    Raises:
        ConfigError: a source that is not there or does not fit.
    """
    match config:
        case DualConfig():
            return resolve_dual(config)
        case FlavaConfig():
            return resolve_flava(config)
        case _:
            return config


def build_model(config: AnyModelConfig, tokens: SpecialTokens | None) -> PreTrainedModel:
    """transformers' class of the family, with fresh weights.

    Args:
        tokens: of the tokenizer; None of a model that reads no text.

    Raises:
        ConfigError: sizes that do not fit one another or the tokenizer.
    """
    if isinstance(config, DvaeConfig):
        return build_codebook(config)
    assert tokens is not None, "a model that reads text has a tokenizer"
    match config:
        case ClipConfig():
            return build_clip(config, tokens)
        case SiglipConfig():
            return build_siglip(config, tokens)
        case AlignConfig():
            return build_align(config, tokens)
        case DualConfig():
            return build_dual(config, tokens)
        case FlavaConfig():
            return build_flava(config, tokens)


def outline(config: AnyModelConfig) -> PreTrainedModel:
    """The model on the meta device: nothing is allocated.

    Raises:
        ConfigError: as `build_model`.
    """
    tokens = None if isinstance(config, DvaeConfig) else SpecialTokens(bos=0, eos=config.vocab_size - 1, pad=1)
    with torch.device("meta"):
        return build_model(config, tokens)


def parameter_count(config: AnyModelConfig) -> int:
    return sum(p.numel() for p in outline(config).parameters())
