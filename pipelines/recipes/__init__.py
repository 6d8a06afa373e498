"""Recipes: functions that return a complete `TrainRun`. A variant calls its base and copies it with changes."""

from __future__ import annotations

from collections.abc import Callable

from mm_core.config import nearest
from mm_core.errors import ConfigError
from pipelines.recipes.align import align_base, align_tiny
from pipelines.recipes.clip import (
    clip_tiny,
    clip_tiny_photo,
    clip_vit_b16,
    clip_vit_b32,
    clip_vit_bigg14,
    clip_vit_h14,
    clip_vit_l14,
    clip_vit_s16,
    clip_vit_s32,
    clip_vit_ti16,
)
from pipelines.recipes.codebook import codebook_tiny
from pipelines.recipes.dual import dual
from pipelines.recipes.flava import flava_base, flava_base_classify, flava_tiny, flava_tiny_classify
from pipelines.recipes.siglip import siglip_tiny, siglip_vit_b16
from pipelines.train.config import TrainRun

RECIPES: dict[str, Callable[[], TrainRun]] = {
    "clip-tiny": clip_tiny,
    "clip-tiny-photo": clip_tiny_photo,
    "clip-vit-ti16": clip_vit_ti16,
    "clip-vit-s32": clip_vit_s32,
    "clip-vit-s16": clip_vit_s16,
    "clip-vit-b32": clip_vit_b32,
    "clip-vit-b16": clip_vit_b16,
    "clip-vit-l14": clip_vit_l14,
    "clip-vit-h14": clip_vit_h14,
    "clip-vit-bigg14": clip_vit_bigg14,
    "siglip-tiny": siglip_tiny,
    "siglip-vit-b16": siglip_vit_b16,
    "align-tiny": align_tiny,
    "align-base": align_base,
    "dual": dual,
    "flava-tiny": flava_tiny,
    "flava-base": flava_base,
    "flava-tiny-classify": flava_tiny_classify,
    "flava-base-classify": flava_base_classify,
    "codebook-tiny": codebook_tiny,
}


def recipe(name: str) -> TrainRun:
    """
    Raises:
        ConfigError: there is none of this name.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, list(RECIPES))}")
    return RECIPES[name]()
