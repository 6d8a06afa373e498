"""Learning rate over steps: linear warm-up, then half a cosine."""

from __future__ import annotations

import math

from pydantic import Field

from mm_core.config import Config


class ScheduleConfig(Config):
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    min_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="Where the cosine ends, as a fraction of the peak.")


def lr_at(config: ScheduleConfig, peak_lr: float, step: int, total_steps: int) -> float:
    """The learning rate of the optimiser step numbered `step`, from 0; never 0 in the warm-up, the minimum from `total_steps` on."""
    if step < config.warmup_steps:
        return peak_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak_lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * cosine)
