"""What a two-tower model is made of: sizes and special tokens, without the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from mm_core.config import Config
from mm_core.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class TowerConfig(Config):
    """One transformer."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    mlp_width: int | None = Field(default=None, gt=0, description="By default four times the width.")


class TwoTowerConfig(Config):
    """What every family has: how images and texts are fed, and the joint space."""

    derived: ClassVar[frozenset[str]] = frozenset({"vocab_size"})
    """Fields that are set when a run begins, from its tokenizer and its sources."""
    masks_padding: ClassVar[bool] = True
    """Whether the text tower takes an attention mask."""
    needs: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    """The modalities that every source of a run has to have."""
    reads_text: ClassVar[bool] = True

    image_size: int = Field(gt=0, description="Side of the square input, pixels.")
    context_length: int = Field(gt=1, description="Tokens of a caption, begin and end marks included.")
    vocab_size: int = Field(gt=0, description="Set from the tokenizer.")
    embed_dim: int = Field(gt=0, description="Of the joint space.")
    image_mean: tuple[float, float, float] = Field(default=(0.5, 0.5, 0.5), description="Of pixels in [0, 1].")
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def tokenizer_source(self) -> str | None:
        """The tokenizer that the weights of a source belong to; None of a model that starts fresh."""
        return None

    @property
    def is_resolved(self) -> bool:
        """Whether all that decides its shapes is known; of a model with sources, once they are read."""
        return True


class TransformerTowersConfig(TwoTowerConfig):
    """Two transformers, one of them over patches, the other over texts with their padding."""

    masks_padding: ClassVar[bool] = False

    patch_size: int = Field(gt=0, description="Side of a patch, pixels.")
    vision: TowerConfig
    text: TowerConfig


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's marks."""

    bos: int
    eos: int
    pad: int


def check_vocabulary(vocab_size: int, tokens: SpecialTokens) -> None:
    """
    Raises:
        ConfigError: the tokenizer's marks are not in the vocabulary.
    """
    if max(tokens.bos, tokens.eos, tokens.pad) >= vocab_size:
        raise ConfigError(f"model.vocab_size {vocab_size} does not hold the tokenizer's marks {tokens}: set it to the tokenizer's size")


def check_padding(family: str, tokens: SpecialTokens) -> None:
    """
    Raises:
        ConfigError: a mask could not tell padding from text.
    """
    if tokens.pad == tokens.eos:
        raise ConfigError(
            f"the text tower of a {family} model masks padding, and the tokenizer has no padding token of its own: take another"
        )


def check_heads(name: str, tower: TowerConfig) -> None:
    """
    Raises:
        ConfigError: the heads do not divide the width.
    """
    if tower.width % tower.heads:
        raise ConfigError(f"model.{name}.width {tower.width} is no multiple of its {tower.heads} heads")


def check_sizes(config: TransformerTowersConfig, tokens: SpecialTokens) -> None:
    """
    Raises:
        ConfigError: sizes that do not fit one another or the tokenizer.
    """
    check_vocabulary(config.vocab_size, tokens)
    if config.image_size % config.patch_size:
        raise ConfigError(f"image_size {config.image_size} is no multiple of patch_size {config.patch_size}")
    check_heads("vision", config.vision)
    check_heads("text", config.text)


def tower_settings(tower: TowerConfig) -> dict[str, int]:
    """A transformer's sizes by transformers' names."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width or 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
    }
