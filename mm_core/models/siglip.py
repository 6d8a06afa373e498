"""SigLIP (Zhai et al. 2023, arXiv 2303.15343): sizes, and transformers' `SiglipModel` built from them.

Its text is not causal and is pooled at its last token, padding included; its image tower pools by attention and has no projection, so
the joint space is as wide as the image tower.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from mm_core.errors import ConfigError
from mm_core.models.sizes import SpecialTokens, TowerConfig, TransformerTowersConfig, check_sizes, tower_settings

if TYPE_CHECKING:
    from transformers import SiglipModel

INITIAL_LOGIT_SCALE, INITIAL_LOGIT_BIAS = math.log(10), -10.0
"""Section 3.2: nearly all pairs do not belong together, and the first steps should not have to learn that."""


class SiglipConfig(TransformerTowersConfig):
    """Sizes of both towers, and how images are fed."""

    family: Literal["siglip"] = "siglip"


def siglip_vit_b16() -> SiglipConfig:
    tower = TowerConfig(width=768, layers=12, heads=12)
    return SiglipConfig(image_size=224, patch_size=16, context_length=64, vocab_size=32000, embed_dim=768, vision=tower, text=tower)


def siglip_tiny() -> SiglipConfig:
    """`clip_tiny`'s sizes."""
    return SiglipConfig(
        image_size=64,
        patch_size=16,
        context_length=32,
        vocab_size=1024,
        embed_dim=128,
        vision=TowerConfig(width=128, layers=4, heads=4),
        text=TowerConfig(width=128, layers=3, heads=4),
    )


def build_siglip(config: SiglipConfig, tokens: SpecialTokens) -> SiglipModel:
    """A `SiglipModel` with fresh weights, temperature and bias as in the paper.

    Raises:
        ConfigError: sizes that do not fit.
    """
    check_sizes(config, tokens)
    if config.embed_dim != config.vision.width:
        raise ConfigError(f"model.embed_dim {config.embed_dim} of a siglip model is its model.vision.width, {config.vision.width}")
    from transformers import SiglipConfig as HFSiglipConfig
    from transformers import SiglipModel

    from mm_core.models.quiet import quiet

    with quiet():  # its defaults, made first, name tokens of another vocabulary
        hf_config = HFSiglipConfig(
            text_config={
                **tower_settings(config.text),
                "projection_size": config.embed_dim,
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.context_length,
                "bos_token_id": tokens.bos,
                "eos_token_id": tokens.eos,
                "pad_token_id": tokens.pad,
            },
            vision_config={**tower_settings(config.vision), "image_size": config.image_size, "patch_size": config.patch_size},
        )
    model = SiglipModel(hf_config)
    with torch.no_grad():
        model.logit_scale.fill_(INITIAL_LOGIT_SCALE)
        model.logit_bias.fill_(INITIAL_LOGIT_BIAS)
    return model
