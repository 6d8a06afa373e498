"""FLAVA (Singh et al. 2022, arXiv 2112.04482): sizes, and transformers' `FlavaForPreTraining` built from them.

Two towers, and a third transformer over what both give; a masked patch is predicted as its entry in the codebook of a discrete VAE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mm_core.errors import ConfigError
from mm_core.models.codebook import CODEBOOK_STRIDE, CodebookSizes, codebook_settings, codebook_sizes
from mm_core.models.sizes import (
    OPENAI_MEAN,
    OPENAI_STD,
    SpecialTokens,
    TowerConfig,
    TransformerTowersConfig,
    check_heads,
    check_padding,
    check_sizes,
    tower_settings,
)

if TYPE_CHECKING:
    from transformers import FlavaConfig as HFFlavaConfig
    from transformers import FlavaForPreTraining

_UNREAD = ("flava.image_model.pooler", "flava.text_model.pooler", "flava.multimodal_model.pooler")
"""Of the class, but read by no objective."""


class FlavaConfig(TransformerTowersConfig):
    """Sizes of the towers and of the transformer over both, and how they are fed."""

    masks_padding: ClassVar[bool] = True
    derived: ClassVar[frozenset[str]] = TransformerTowersConfig.derived | {"codebook"}

    needs: ClassVar[frozenset[str]] = frozenset()

    family: Literal["flava"] = "flava"
    fusion: TowerConfig
    text_positions: int = Field(gt=1, description="Places the text tower knows, context_length of them in use.")
    codebook: CodebookSizes = Field(default=CodebookSizes(), description="Set from codebook_source.")
    codebook_source: str | None = Field(
        default=None, description="Folder or hub id of the codebook, a bundle of `codebook-tiny` say; by default --init's."
    )
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD

    @property
    def grid(self) -> int:
        """Patches along a side, and entries of the codebook along a side of its picture."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def codebook_size(self) -> int:
        """Side of the picture that the codebook sees, pixels."""
        return self.grid * CODEBOOK_STRIDE


def flava_base() -> FlavaConfig:
    """The paper's (section 3.1), which are those of facebook/flava-full: ViT-B/16 for images, the same transformer for texts, six layers
    over both; DALL-E's codebook of 8,192 entries."""
    tower = TowerConfig(width=768, layers=12, heads=12)
    return FlavaConfig(
        image_size=224,
        patch_size=16,
        context_length=77,
        text_positions=512,
        vocab_size=30522,
        embed_dim=768,
        vision=tower,
        text=tower,
        fusion=TowerConfig(width=768, layers=6, heads=12),
        codebook_source="facebook/flava-image-codebook",
    )


def flava_tiny() -> FlavaConfig:
    """Trains in minutes on two CPU cores."""
    return FlavaConfig(
        image_size=64,
        patch_size=16,
        context_length=32,
        text_positions=32,
        vocab_size=1024,
        embed_dim=128,
        vision=TowerConfig(width=128, layers=4, heads=4),
        text=TowerConfig(width=128, layers=3, heads=4),
        fusion=TowerConfig(width=128, layers=2, heads=4),
        codebook=CodebookSizes(width=16, blocks_per_group=1, entries=128),
    )


def resolve_flava(config: FlavaConfig) -> FlavaConfig:
    """The same with the sizes of its codebook.

    Raises:
        ConfigError: no codebook is named, or there is none.
    """
    if config.codebook_source is None:
        raise ConfigError(
            "a flava model predicts entries of a codebook: name one with model.codebook_source, a bundle that `mm train codebook-tiny` made"
            " or facebook/flava-image-codebook, or begin with a flava model, --init"
        )
    return config.model_copy(update={"codebook": codebook_sizes(config.codebook_source)})


def build_flava(config: FlavaConfig, tokens: SpecialTokens) -> FlavaForPreTraining:
    """A `FlavaForPreTraining` with fresh weights, its codebook frozen. Parameters that no objective reads are not trained.

    Raises:
        ConfigError: sizes that do not fit one another or the tokenizer.
    """
    check_sizes(config, tokens)
    check_heads("fusion", config.fusion)
    check_padding(config.family, tokens)
    widths = {name: getattr(config, name).width for name in ("vision", "text", "fusion")}
    if len({*widths.values()}) > 1:
        raise ConfigError(f"the heads of FLAVA are of one width, and model.…width is {widths}: set all three alike")
    if config.context_length > config.text_positions:
        raise ConfigError(f"model.context_length {config.context_length} is above model.text_positions {config.text_positions}")
    from transformers import FlavaForPreTraining

    model = FlavaForPreTraining(hf_config(config, tokens))
    for name in _UNREAD:
        model.get_submodule(name).requires_grad_(False)
    return model


def _spread(tower: TowerConfig) -> dict[str, float]:
    """Of initial weights: FLAVA's own at its width, and more where narrower, so that attention's scores begin as far apart."""
    return {"initializer_range": 0.02 * (768 / tower.width) ** 0.5}


def hf_config(config: FlavaConfig, tokens: SpecialTokens) -> HFFlavaConfig:
    """The same sizes as transformers' configuration."""
    from transformers import FlavaConfig as HFFlavaConfig

    image = {"image_size": config.image_size, "patch_size": config.patch_size, "vocab_size": config.codebook.entries}
    text = {"vocab_size": config.vocab_size, "max_position_embeddings": config.text_positions, "pad_token_id": tokens.pad}
    return HFFlavaConfig(
        image_config=tower_settings(config.vision) | image | _spread(config.vision),
        text_config=tower_settings(config.text) | text | _spread(config.text),
        multimodal_config=tower_settings(config.fusion) | _spread(config.fusion),
        image_codebook_config=codebook_settings(config.codebook),
        hidden_size=config.fusion.width,
        projection_dim=config.embed_dim,
    )
