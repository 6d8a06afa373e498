"""CLIP (Radford et al. 2021, arXiv 2103.00020): sizes, and transformers' `CLIPModel` built from them.

transformers is imported where a model is built, as that takes seconds and most programs need only the sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mm_core.errors import ConfigError
from mm_core.models.sizes import (
    OPENAI_MEAN,
    OPENAI_STD,
    SpecialTokens,
    TowerConfig,
    TransformerTowersConfig,
    check_sizes,
    tower_settings,
)

if TYPE_CHECKING:
    from transformers import CLIPConfig as HFClipConfig
    from transformers import CLIPModel

Activation = Literal["quick_gelu", "gelu"]
"""Of the MLPs: OpenAI's models have the first, open_clip's own the second."""
LEGACY_EOS = 2
"""With this `eos_token_id`, which the first CLIP exports state whatever their tokenizer's, transformers pools at the largest token id."""


class ClipConfig(TransformerTowersConfig):
    """Sizes of both towers, and how images are fed."""

    family: Literal["clip"] = "clip"
    hidden_act: Activation = "quick_gelu"
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD


def clip_vit_b32() -> ClipConfig:
    return ClipConfig(
        image_size=224,
        patch_size=32,
        context_length=77,
        vocab_size=49408,
        embed_dim=512,
        vision=TowerConfig(width=768, layers=12, heads=12),
        text=TowerConfig(width=512, layers=12, heads=8),
    )


def clip_vit_b16() -> ClipConfig:
    return clip_vit_b32().model_copy(update={"patch_size": 16})


def clip_vit_l14() -> ClipConfig:
    return clip_vit_b32().model_copy(
        update={
            "patch_size": 14,
            "embed_dim": 768,
            "vision": TowerConfig(width=1024, layers=24, heads=16),
            "text": TowerConfig(width=768, layers=12, heads=12),
        }
    )


def clip_vit_ti16() -> ClipConfig:
    """CLIP-KD's smallest (Yang et al. 2024, arXiv 2307.12732; its repository's ViT-T-16.json): DeiT-Ti for images, S's text tower."""
    return clip_vit_s16().model_copy(update={"embed_dim": 512, "vision": TowerConfig(width=192, layers=12, heads=3)})


def clip_vit_s32() -> ClipConfig:
    """open_clip's ViT-S-32.json."""
    return clip_vit_b32().model_copy(
        update={
            "embed_dim": 384,
            "vision": TowerConfig(width=384, layers=12, heads=6),
            "text": TowerConfig(width=384, layers=12, heads=6),
            "hidden_act": "gelu",
        }
    )


def clip_vit_s16() -> ClipConfig:
    """open_clip's ViT-S-16.json."""
    return clip_vit_s32().model_copy(update={"patch_size": 16})


def clip_vit_h14() -> ClipConfig:
    """open_clip's ViT-H-14.json (Schuhmann et al. 2022, arXiv 2210.08402, table 12)."""
    return clip_vit_b32().model_copy(
        update={
            "patch_size": 14,
            "embed_dim": 1024,
            "vision": TowerConfig(width=1280, layers=32, heads=16),
            "text": TowerConfig(width=1024, layers=24, heads=16),
            "hidden_act": "gelu",
        }
    )


def clip_vit_bigg14() -> ClipConfig:
    """open_clip's ViT-bigG-14.json."""
    return clip_vit_h14().model_copy(
        update={
            "embed_dim": 1280,
            "vision": TowerConfig(width=1664, layers=48, heads=16, mlp_width=8192),
            "text": TowerConfig(width=1280, layers=32, heads=20),
        }
    )


def clip_tiny() -> ClipConfig:
    """Trains in minutes on two CPU cores."""
    return ClipConfig(
        image_size=64,
        patch_size=16,
        context_length=32,
        vocab_size=1024,
        embed_dim=128,
        vision=TowerConfig(width=128, layers=4, heads=4),
        text=TowerConfig(width=128, layers=3, heads=4),
        hidden_act="gelu",
    )


def clip_tiny_photo() -> ClipConfig:
    """For photographs, still on two CPU cores: 36 patches, a larger vocabulary."""
    return ClipConfig(
        image_size=96,
        patch_size=16,
        context_length=24,
        vocab_size=4096,
        embed_dim=192,
        vision=TowerConfig(width=192, layers=6, heads=6),
        text=TowerConfig(width=192, layers=3, heads=6),
        hidden_act="gelu",
    )


def build_clip(config: ClipConfig, tokens: SpecialTokens) -> CLIPModel:
    """A `CLIPModel` with fresh weights.

    Raises:
        ConfigError: sizes that do not fit, or an EOS id that would switch on transformers' legacy pooling.
    """
    if tokens.eos == LEGACY_EOS:
        raise ConfigError(
            f"the tokenizer's end-of-text id is {LEGACY_EOS}, for which transformers' CLIP pools at the wrong token: use another tokenizer"
        )
    check_sizes(config, tokens)
    from transformers import CLIPModel

    return CLIPModel(hf_config(config, tokens))


def hf_config(config: ClipConfig, tokens: SpecialTokens) -> HFClipConfig:
    """The same sizes as transformers' configuration."""
    from transformers import CLIPConfig as HFClipConfig

    shared = {"hidden_act": config.hidden_act, "projection_dim": config.embed_dim}
    return HFClipConfig(
        text_config={
            **tower_settings(config.text),
            **shared,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
        },
        vision_config={**tower_settings(config.vision), **shared, "image_size": config.image_size, "patch_size": config.patch_size},
        projection_dim=config.embed_dim,
    )
