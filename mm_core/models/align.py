"""ALIGN (Jia et al. 2021, arXiv 2102.05918): sizes, and transformers' `AlignModel` built from them.

An EfficientNet, whose last channels are the joint space, since it has no projection; and a BERT, pooled at its first token. What is
learned of the temperature is the divisor of the logits itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mm_core.config import Config
from mm_core.errors import ConfigError
from mm_core.models.sizes import SpecialTokens, TowerConfig, TwoTowerConfig, check_heads, check_padding, check_vocabulary, tower_settings

if TYPE_CHECKING:
    from transformers import AlignConfig as HFAlignConfig
    from transformers import AlignModel


class EfficientNetConfig(Config):
    """EfficientNet-B0 and its multiples (Tan and Le 2019, arXiv 1905.11946): B7 is twice as wide and 3.1 times as deep."""

    width: float = Field(gt=0, description="Channels, as a multiple of B0's.")
    depth: float = Field(gt=0, description="Blocks, as a multiple of B0's.")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="Of the last block; it grows from 0 at the first.")
    batch_norm_momentum: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Share of a step's batch in the running statistics. Published configurations state TensorFlow's 0.99: what stays.",
    )


class AlignConfig(TwoTowerConfig):
    """Sizes of both towers, and how they are fed."""

    family: Literal["align"] = "align"
    image_size: int = Field(ge=32, description="Side of the square input, pixels, which the image tower halves five times.")
    vision: EfficientNetConfig
    text: TowerConfig
    text_positions: int = Field(gt=1, description="Places the text tower knows, context_length of them in use.")
    text_dropout: float = Field(default=0.1, ge=0, lt=1)
    initial_temperature: float = Field(default=1.0, ge=0.01, le=1, description="Divisor of the logits at the start.")


def align_base() -> AlignConfig:
    """kakaobrain/align-base: EfficientNet-B7 and BERT-base, images and texts fed as in section 5 of the paper."""
    return AlignConfig(
        image_size=289,
        context_length=64,
        vocab_size=30522,
        embed_dim=640,
        vision=EfficientNetConfig(width=2.0, depth=3.1),
        text=TowerConfig(width=768, layers=12, heads=12),
        text_positions=512,
    )


def align_tiny() -> AlignConfig:
    """Trains in minutes on two CPU cores: a narrow, shallow EfficientNet, and `clip_tiny`'s text tower as a BERT.

    So few steps neither find a temperature from 1 nor fill slow statistics, and need no dropout.
    """
    return AlignConfig(
        image_size=64,
        context_length=32,
        vocab_size=1024,
        embed_dim=128,
        vision=EfficientNetConfig(width=0.4, depth=0.5, dropout=0.0, batch_norm_momentum=0.1),
        text=TowerConfig(width=128, layers=3, heads=4),
        text_positions=32,
        text_dropout=0.0,
        initial_temperature=0.07,
    )


def build_align(config: AlignConfig, tokens: SpecialTokens) -> AlignModel:
    """An `AlignModel` with fresh weights. The text tower's pooler, which no feature reads, is not trained.

    Raises:
        ConfigError: sizes that do not fit one another or the tokenizer.
    """
    check_vocabulary(config.vocab_size, tokens)
    check_padding(config.family, tokens)
    check_heads("text", config.text)
    if config.context_length > config.text_positions:
        raise ConfigError(f"model.context_length {config.context_length} is above model.text_positions {config.text_positions}")
    from transformers import AlignModel
    from transformers.models.align.modeling_align import round_filters

    hf_config = _hf_config(config, tokens)
    channels = round_filters(hf_config.vision_config, hf_config.vision_config.out_channels[-1])
    if channels != config.embed_dim:
        raise ConfigError(
            f"model.embed_dim {config.embed_dim} of an align model is what its image tower ends with, {channels} channels at"
            f" model.vision.width {config.vision.width}"
        )
    model = AlignModel(hf_config)
    model.text_model.pooler.requires_grad_(False)
    return model


def _hf_config(config: AlignConfig, tokens: SpecialTokens) -> HFAlignConfig:
    """The same sizes as transformers' configuration."""
    from transformers import AlignConfig as HFAlignConfig

    return HFAlignConfig(
        text_config={
            **tower_settings(config.text),
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.text_positions,
            "hidden_dropout_prob": config.text_dropout,
            "attention_probs_dropout_prob": config.text_dropout,
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
        },
        vision_config={
            "image_size": config.image_size,
            "width_coefficient": config.vision.width,
            "depth_coefficient": config.vision.depth,
            "drop_connect_rate": config.vision.dropout,
            "batch_norm_momentum": config.vision.batch_norm_momentum,
        },
        projection_dim=config.embed_dim,
        temperature_init_value=config.initial_temperature,
    )
