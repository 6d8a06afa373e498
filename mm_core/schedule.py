"""Learning rate over steps: linear warm-up, then half a cosine, or a constant with a cooldown at the end."""

from __future__ import annotations

import math
from enum import StrEnum

from pydantic import Field

from mm_core.config import Config


class ScheduleKind(StrEnum):
    COSINE = "cosine"
    """Its length has to be known from the start."""
    WSD = "wsd"
    """Warm-up, stable, decay (Hägele et al. 2024, arXiv 2405.18392): until the cooldown the rate does not depend on the number of steps."""


class ScheduleConfig(Config):
    kind: ScheduleKind = ScheduleKind.COSINE
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")
    min_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="Where the rate ends, as a fraction of the peak.")
    cooldown_fraction: float = Field(default=0.2, gt=0, le=1, description="Of wsd: share of all steps in which the rate falls at the end.")


def lr_at(config: ScheduleConfig, peak_lr: float, step: int, total_steps: int) -> float:
    """The learning rate of the optimiser step numbered `step`, from 0; never 0 in the warm-up, the minimum from `total_steps` on."""
    if step < config.warmup_steps:
        return peak_lr * (step + 1) / config.warmup_steps
    match config.kind:
        case ScheduleKind.COSINE:
            share = 0.5 * (1 + math.cos(math.pi * _progress(step, config.warmup_steps, total_steps)))
        case ScheduleKind.WSD:
            cooldown = max(config.warmup_steps, total_steps - round(config.cooldown_fraction * total_steps))
            share = 1 - math.sqrt(_progress(step, cooldown, total_steps))
    return peak_lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * share)


def _progress(step: int, first: int, last: int) -> float:
    """From 0 at `first` to 1 at `last`."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))
