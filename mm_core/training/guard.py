"""Steps that would spoil a model: a gradient that is not finite, a loss that jumps. What is done about them is the run's policy."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from enum import StrEnum

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from mm_core.config import Config
from mm_core.objectives.output import LossOutput

WINDOW = 100
"""Losses that a jump is measured by."""
_SPREAD = 1.4826
"""Times the median deviation: the standard deviation of a normal distribution."""
_LEAST_SPREAD = 1e-3
"""Of the loss, as a share: losses that hardly differ have no spread to speak of."""


class Remedy(StrEnum):
    STOP = "stop"
    """The run ends with the samples of the batch named; its checkpoints are from before."""
    SKIP = "skip"
    """The update is left out."""
    ROLLBACK = "rollback"
    """The last updates are undone, from a checkpoint, and their batches left out (PaLM: Chowdhery et al. 2022, arXiv 2204.02311, 5.1)."""


class Trouble(StrEnum):
    NOT_FINITE = "not finite"
    SPIKE = "spike"


class GuardConfig(Config):
    """What is done about a step that would spoil the model."""

    not_finite: Remedy = Field(default=Remedy.STOP, description="Of a gradient that is not finite: stop, skip or rollback.")
    spike: Remedy | None = Field(default=None, description="Of a loss that jumps: stop, skip or rollback; by default none is looked for.")
    spike_spreads: float = Field(
        default=8.0, gt=0, description="A jump is a loss so many spreads (1.48 median deviations) above the median of the last 100."
    )
    rollback_steps: int = Field(default=100, gt=0, description="Updates that a rollback undoes and leaves out.")
    max_remedies: int = Field(
        default=20, gt=0, description="Skips and rollbacks together since the workers were started; then the run stops."
    )

    @property
    def reach_back(self) -> int:
        """Steps that a checkpoint has to be older than the newest, so that there is one to go back to."""
        return self.rollback_steps if Remedy.ROLLBACK in (self.not_finite, self.spike) else 0

    @property
    def looks_before_updating(self) -> bool:
        """Whether every step waits for its own loss and gradient norm; else they are looked at a step later, which costs nothing."""
        return self.not_finite is not Remedy.STOP or self.spike is not None

    def remedy(self, trouble: Trouble) -> Remedy:
        if trouble is Trouble.NOT_FINITE:
            return self.not_finite
        assert self.spike is not None, "none is looked for"
        return self.spike


class StepGuard:
    """Looks at the loss and the gradient of every step before its update. All ranks come to the same verdict."""

    def __init__(self, config: GuardConfig, recent_losses: Iterable[float] = ()) -> None:
        """`recent_losses`: of a checkpoint, so that a continued run judges as an undisturbed one does."""
        self._config = config
        self._losses: deque[float] = deque(recent_losses, maxlen=WINDOW)

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """Of the steps that were applied, over the global batch."""
        return tuple(self._losses)

    def judge(self, loss: LossOutput, grad_norm: Tensor) -> Trouble | None:
        """Waits for the device, and for all ranks. What is no trouble joins the losses that the next ones are measured by."""
        total = torch.stack([*loss.terms.values()]).detach().float().sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        value, norm = torch.stack([total, grad_norm.float()]).tolist()
        if not (math.isfinite(value) and math.isfinite(norm)):
            return Trouble.NOT_FINITE
        if self._config.spike is not None and self._is_spike(value):
            return Trouble.SPIKE
        self._losses.append(value)
        return None

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < WINDOW:
            return False
        median = statistics.median(self._losses)
        spread = _SPREAD * statistics.median(abs(one - median) for one in self._losses)
        return loss > median + self._config.spike_spreads * max(spread, _LEAST_SPREAD * abs(median))
