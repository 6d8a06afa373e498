"""A dual encoder: two towers from the hub or from folders, joined as LiT joins them (Zhai et al. 2022, arXiv 2111.07991)."""

from __future__ import annotations

from mm_core.models.dual import DualConfig
from mm_core.models.two_tower import Tower
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from pipelines.train.config import CheckpointConfig, DataConfig, TowersConfig, TrainRun


def dual() -> TrainRun:
    """Any two towers: model.vision_source and model.text_source; by default LiT's, ViT-B/16 and BERT-base, the first of them locked."""
    return TrainRun(
        recipe="dual",
        model=DualConfig(
            image_size=224,
            context_length=64,
            vocab_size=30522,
            embed_dim=768,
            vision_source="google/vit-base-patch16-224-in21k",
            text_source="google-bert/bert-base-uncased",
        ),
        towers=TowersConfig(frozen=Tower.VISION),
        data=DataConfig(chunk=64, run_length=64),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=1e-4),
        schedule=ScheduleConfig(warmup_steps=10_000),
        steps=60_000,
        global_batch_size=16_384,
        checkpoint=CheckpointConfig(every_steps=1000),
    )
