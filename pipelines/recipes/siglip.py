"""SigLIP recipes. Hyperparameters: Zhai et al. 2023, section 4 and table 1; the tokenizer is the published model's."""

from __future__ import annotations

from mm_core.models import siglip as models
from mm_core.objectives.config import ObjectiveConfig, ObjectiveKind
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from pipelines.recipes.clip import clip_tiny
from pipelines.train.config import CheckpointConfig, DataConfig, TokenizerConfig, TrainRun


def siglip_tiny() -> TrainRun:
    """`clip-tiny` with the sigmoid loss."""
    base = clip_tiny()
    return base.model_copy(
        update={"recipe": "siglip-tiny", "model": models.siglip_tiny(), "objective": ObjectiveConfig(kind=ObjectiveKind.SIGMOID)}
    )


def siglip_vit_b16() -> TrainRun:
    """ViT-B/16 at 32k, 10 billion pairs."""
    return TrainRun(
        recipe="siglip-vit-b16",
        model=models.siglip_vit_b16(),
        objective=ObjectiveConfig(kind=ObjectiveKind.SIGMOID),
        tokenizer=TokenizerConfig(source="google/siglip-base-patch16-224"),
        data=DataConfig(chunk=64, run_length=64),
        optimizer=OptimizerConfig(lr=1e-3, beta2=0.95, weight_decay=1e-4),
        schedule=ScheduleConfig(warmup_steps=2000),
        steps=305_176,
        global_batch_size=32_768,
        checkpoint=CheckpointConfig(every_steps=1000),
    )
