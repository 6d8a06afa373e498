"""What a two-tower model is made of: sizes and special tokens, without the model itself."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from mm_core.config import Config
from mm_core.errors import ConfigError


class TowerConfig(Config):
    """One transformer; its MLP is four times as wide."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)


class TwoTowerConfig(Config):
    """Sizes of both towers, and how images are fed: what every family has."""

    image_size: int = Field(gt=0, description="Side of the square input, pixels.")
    patch_size: int = Field(gt=0, description="Side of a patch, pixels.")
    context_length: int = Field(gt=1, description="Tokens of a caption, begin and end marks included.")
    vocab_size: int = Field(gt=0, description="Set from the tokenizer.")
    embed_dim: int = Field(gt=0, description="Of the joint space.")
    vision: TowerConfig
    text: TowerConfig


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's marks."""

    bos: int
    eos: int
    pad: int


def check_sizes(config: TwoTowerConfig, tokens: SpecialTokens) -> None:
    """
    Raises:
        ConfigError: sizes that do not fit one another or the tokenizer.
    """
    if max(tokens.bos, tokens.eos, tokens.pad) >= config.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.vocab_size} does not hold the tokenizer's marks {tokens}: set it to the tokenizer's size"
        )
    if config.image_size % config.patch_size:
        raise ConfigError(f"image_size {config.image_size} is no multiple of patch_size {config.patch_size}")
    for name, tower in (("vision", config.vision), ("text", config.text)):
        if tower.width % tower.heads:
            raise ConfigError(f"model.{name}.width {tower.width} is no multiple of its {tower.heads} heads")


def tower_settings(tower: TowerConfig) -> dict[str, int]:
    """A transformer's sizes by transformers' names."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
    }
