"""The codebook that FLAVA's masked patches are predicted as. Hyperparameters in the manner of Ramesh et al. 2021, appendix A.2."""

from __future__ import annotations

from mm_core.data.augment import AugmentConfig
from mm_core.models.dvae import codebook_tiny as model
from mm_core.objectives.codebook import CodebookObjectiveConfig
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig
from pipelines.train.config import CheckpointConfig, DataConfig, TrainRun


def codebook_tiny() -> TrainRun:
    """For `flava-tiny`, on the same pictures, at the size at which each of its patches is one entry; two minutes on two CPU cores."""
    return TrainRun(
        recipe="codebook-tiny",
        model=model(),
        objective=CodebookObjectiveConfig(kl_weight=0.5, usage_weight=0.1),
        data=DataConfig(chunk=16, augment=AugmentConfig(crop_area=(0.9, 1.0))),
        optimizer=OptimizerConfig(lr=3e-3, beta2=0.99, weight_decay=1e-4),
        schedule=ScheduleConfig(warmup_steps=50),
        steps=600,
        global_batch_size=64,
        checkpoint=CheckpointConfig(every_steps=200),
    )
