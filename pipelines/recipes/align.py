"""ALIGN recipes. Hyperparameters: Jia et al. 2021, sections 4 and 5; the tokenizer is the published model's."""

from __future__ import annotations

from mm_core.data.augment import AugmentConfig
from mm_core.models import align as models
from mm_core.objectives.config import ObjectiveConfig
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from pipelines.recipes.clip import clip_tiny
from pipelines.train.config import CheckpointConfig, DataConfig, TokenizerConfig, TrainRun

_LABEL_SMOOTHING = ObjectiveConfig(label_smoothing=0.1)


def align_tiny() -> TrainRun:
    """`clip-tiny` with an EfficientNet and a BERT."""
    base = clip_tiny()
    return base.model_copy(update={"recipe": "align-tiny", "model": models.align_tiny(), "objective": _LABEL_SMOOTHING})


def align_base() -> TrainRun:
    """EfficientNet-B7 and BERT-base at 16k, twelve epochs of 1.8 billion pairs.

    The paper's optimiser is LAMB, for which AdamW stands here at its rate and decay, and the rate falls along half a cosine, not a line.
    Its crop of 289 of 346 pixels is a share of (289/346)² of the picture.
    """
    return TrainRun(
        recipe="align-base",
        model=models.align_base(),
        objective=_LABEL_SMOOTHING,
        tokenizer=TokenizerConfig(source="kakaobrain/align-base"),
        data=DataConfig(chunk=64, run_length=64, augment=AugmentConfig(crop_area=(0.7, 0.7), crop_ratio=(1.0, 1.0))),
        optimizer=OptimizerConfig(lr=1e-3, beta2=0.999, weight_decay=1e-5),
        schedule=ScheduleConfig(warmup_steps=10_000),
        steps=1_200_000,
        global_batch_size=16_384,
        checkpoint=CheckpointConfig(every_steps=1000),
    )
