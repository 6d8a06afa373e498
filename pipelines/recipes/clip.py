"""CLIP recipes. Sizes and hyperparameters of the ViT recipes: Radford et al. 2021, tables 19 and 20, as open_clip trains them on
LAION-400M; from H/14 on as it trained them on LAION-2B (Cherti et al. 2023, arXiv 2212.07143; batch and samples are in the published
models' names, s32B-b79K and 39B-b160k). `clip-tiny` and its variant are for two CPU cores."""

from __future__ import annotations

from mm_core.data.augment import AugmentConfig
from mm_core.models import clip as models
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from mm_core.training.parallel import Parallelism
from pipelines.train.config import CheckpointConfig, DataConfig, ParallelConfig, TokenizerConfig, TrainRun


def clip_tiny() -> TrainRun:
    """Rendered scenes, minutes on two CPU cores: the demo's."""
    return TrainRun(
        recipe="clip-tiny",
        model=models.clip_tiny(),
        tokenizer=TokenizerConfig(vocab_size=1024),
        data=DataConfig(chunk=16, augment=AugmentConfig(crop_area=(0.9, 1.0))),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=50),
        steps=400,
        global_batch_size=128,
        checkpoint=CheckpointConfig(every_steps=100),
    )


def clip_tiny_photo() -> TrainRun:
    """Photographs with several captions each, twenty minutes on two CPU cores."""
    base = clip_tiny()
    return base.model_copy(
        update={
            "recipe": "clip-tiny-photo",
            "model": models.clip_tiny_photo(),
            "tokenizer": TokenizerConfig(vocab_size=4096),
            "data": DataConfig(chunk=16, augment=AugmentConfig(crop_area=(0.5, 1.0), crop_ratio=(0.8, 1.25), horizontal_flip=0.5)),
            "optimizer": OptimizerConfig(lr=1e-3, weight_decay=0.2),
            "schedule": ScheduleConfig(warmup_steps=200),
            "steps": 1500,
            "checkpoint": CheckpointConfig(every_steps=500),
        }
    )


def clip_vit_b32() -> TrainRun:
    """ViT-B/32 at 32k, 32 epochs of LAION-400M."""
    return _vit("clip-vit-b32", models.clip_vit_b32())


def clip_vit_b16() -> TrainRun:
    """ViT-B/16, the rest as clip-vit-b32."""
    return _vit("clip-vit-b16", models.clip_vit_b16())


def clip_vit_l14() -> TrainRun:
    """ViT-L/14, the rest as clip-vit-b32 but for a lower rate."""
    run = _vit("clip-vit-l14", models.clip_vit_l14())
    return run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"lr": 4e-4})})


def clip_vit_ti16() -> TrainRun:
    """ViT-Ti/16 with a text tower of S, the rest as clip-vit-b32."""
    return _vit("clip-vit-ti16", models.clip_vit_ti16())


def clip_vit_s32() -> TrainRun:
    """ViT-S/32, the rest as clip-vit-b32."""
    return _vit("clip-vit-s32", models.clip_vit_s32())


def clip_vit_s16() -> TrainRun:
    """ViT-S/16, the rest as clip-vit-b32."""
    return _vit("clip-vit-s16", models.clip_vit_s16())


def clip_vit_h14() -> TrainRun:
    """ViT-H/14 at 79k, 32 billion pairs of LAION-2B; rate and batch as in the published name `Model-H-14_Data-2B_…_lr-5e-4_bs-79k`, the
    warm-up of its siblings of that batch (huggingface.co/laion/scaling-laws-openclip)."""
    run = _vit("clip-vit-h14", models.clip_vit_h14())
    return run.model_copy(
        update={"schedule": ScheduleConfig(warmup_steps=10_000), "steps": 404_531, "global_batch_size": 79_104, "parallel": _MEMORY}
    )


def clip_vit_bigg14() -> TrainRun:
    """ViT-bigG/14 at 160k, 39 billion pairs of LAION-2B. The rest is clip-vit-h14's: what it was trained with has not been published whole
    (its makers masked half of the patches and changed rates on the way, laion.ai/blog/giant-openclip)."""
    update = {"recipe": "clip-vit-bigg14", "model": models.clip_vit_bigg14(), "steps": 243_750, "global_batch_size": 160_000}
    return clip_vit_h14().model_copy(update=update)


_MEMORY = ParallelConfig(kind=Parallelism.FSDP, activation_checkpointing=True)
"""Of models whose state and activations fill a GPU."""


def _vit(name: str, model: models.ClipConfig) -> TrainRun:
    """What they share; 400 M pairs x 32 epochs at a batch of 32,768 are 390,625 steps."""
    return TrainRun(
        recipe=name,
        model=model,
        tokenizer=TokenizerConfig(source="openai/clip-vit-base-patch32"),
        data=DataConfig(chunk=64, run_length=64),
        optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=2000),
        steps=390_625,
        global_batch_size=32_768,
        checkpoint=CheckpointConfig(every_steps=1000),
    )
