"""What a run does about a step that would spoil its model, and how it says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mm_core.training.guard import GuardConfig, Remedy, Trouble
from mm_core.training.step import StepResult
from pipelines.batches import StepBatch
from pipelines.train.outcome import Outcome

_WAYS_OUT = {
    Trouble.NOT_FINITE: "leave such updates out with --set faults.not_finite=skip",
    Trouble.SPIKE: "leave such updates out with --set faults.spike=skip, call fewer losses a jump with a larger faults.spike_spreads",
}
LeftOut = tuple[tuple[int, int], ...]
"""Steps [first, last) whose batches train nothing."""
_UIDS_SHOWN = 8


@dataclass(frozen=True)
class Rollback:
    """The updates of the steps [first, last) are to be undone, and their batches left out."""

    first: int
    last: int


def is_left_out(step: int, left_out: LeftOut) -> bool:
    return any(first <= step < last for first, last in left_out)


class Remedies:
    """Applies the run's policy. All ranks see the same troubles, so all take the same way."""

    def __init__(self, config: GuardConfig | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        """`say` tells a person what was done."""
        self._config, self._say = config or GuardConfig(), say
        self._skips = self._rollbacks = 0

    @property
    def counts(self) -> dict[str, float]:
        """As metrics, since the workers were started; nothing where nothing is looked for."""
        if not self._config.looks_before_updating:
            return {}
        return {"faults/skipped_steps": float(self._skips), "faults/rollbacks": float(self._rollbacks)}

    def apply(self, result: StepResult, batch: StepBatch) -> Outcome | Rollback | None:
        """What follows from a step in trouble, whose update was left out; None: the next step."""
        assert result.trouble is not None, "there is nothing to do about a good step"
        what, remedy = _describe(result, batch.step), self._config.remedy(result.trouble)
        if remedy is Remedy.STOP:
            return Outcome(batch.step, {}, *_failure(what, _WAYS_OUT[result.trouble], batch))
        if self._skips + self._rollbacks == self._config.max_remedies:
            before = self._config.max_remedies
            way_out = f"bear with more than {before} such steps with a larger faults.max_remedies"
            return Outcome(batch.step, {}, *_failure(f"{what}, the last of {before + 1:,} steps in trouble", way_out, batch))
        if remedy is Remedy.SKIP:
            self._skips += 1
            self._say(f"{what}: its update is left out")
            return None
        self._rollbacks += 1
        first = max(0, batch.step + 1 - self._config.rollback_steps)
        self._say(f"{what}: the updates of the steps {first:,} to {batch.step:,} are undone and left out")
        return Rollback(first, batch.step + 1)


def _describe(result: StepResult, step: int) -> str:
    if result.trouble is Trouble.SPIKE:
        return f"the loss of step {step:,} jumps"
    return f"the gradient of step {step:,} is not finite"


def not_finite(batch: StepBatch, grad_norm: torch.Tensor) -> tuple[str, tuple[str, ...]] | None:
    """What to tell of a step whose gradient is not finite, with the uids of its batch, or None. All ranks see the same norm, so all take
    the same way."""
    if math.isfinite(grad_norm.item()):
        return None
    return _failure(f"the gradient of step {batch.step:,} is not finite", _WAYS_OUT[Trouble.NOT_FINITE], batch)


def _failure(what: str, way_out: str, batch: StepBatch) -> tuple[str, tuple[str, ...]]:
    """A collective."""
    uids: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(uids, batch.rows["uid"].to_pylist())
    every = [uid for of_rank in uids for uid in of_rank]
    listed = ", ".join(every[:_UIDS_SHOWN]) + (" …" if len(every) > _UIDS_SHOWN else "")
    return (
        f"{what}, training stopped before it reached a checkpoint; lower optimizer.lr, {way_out}, or look at the samples of that batch,"
        f" {len(every):,} listed in data/stopped_at.json of its MLflow run: {listed}"
    ), tuple(every)


def too_many_replaced(metrics: dict[str, float], samples: int, bound: float) -> str | None:
    """What to tell where more of the samples read since the start had to be replaced than `bound`, or None."""
    replaced = metrics["replaced_samples"]
    if replaced <= bound * samples:
        return None
    reasons = ", ".join(f"{name.removeprefix('replaced/')} {n:,.0f}" for name, n in metrics.items() if name.startswith("replaced/"))
    return (
        f"{replaced:,.0f} of {samples:,} samples could not be read, above data.max_bad_fraction {bound}: {reasons};"
        " index the shards again, or look at their store"
    )
