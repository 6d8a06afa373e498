"""What Prometheus sees of runs and of their data. Ray exports it from the metrics port of every node, and puts `ray_` before each name.

Names here are as Prometheus shows them; `docs/observability.md` lists them. Ray adds labels of its own: job, node, process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

_PREFIX = "ray_"
_BLOCK_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Kind(StrEnum):
    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Exported:
    """A metric. `of` is the run's metric that it follows, as MLflow knows it; one that ends with `/` stands for all below, by the label."""

    name: str
    meaning: str
    kind: Kind = Kind.GAUGE
    labels: tuple[str, ...] = ()
    of: str = ""


_RUN = ("run",)
_CHECKPOINTED = "checkpoint/blocked_s"
"""Logged with every checkpoint."""
STEP = Exported("ray_mm_train_step", "Steps the run has taken.", labels=_RUN)
PLANNED_STEPS = Exported("ray_mm_train_planned_steps", "Steps the run shall take.", labels=_RUN)
CHECKPOINT_STEP = Exported("ray_mm_train_checkpoint_step", "Step of the checkpoint that was taken last.", labels=_RUN)
FOLLOWED = (
    Exported("ray_mm_train_loss", "Loss of the last logged step.", labels=_RUN, of="loss"),
    Exported("ray_mm_train_loss_term", "Each of its terms.", labels=(*_RUN, "term"), of="loss/"),
    Exported("ray_mm_train_learning_rate", "Learning rate.", labels=_RUN, of="lr"),
    Exported("ray_mm_train_gradient_norm", "Norm of the gradient, before it is clipped.", labels=_RUN, of="grad_norm"),
    Exported("ray_mm_train_logit_scale", "Factor of the cosines.", labels=_RUN, of="logit_scale"),
    Exported("ray_mm_train_samples_per_second", "Samples of all ranks together.", labels=_RUN, of="samples_per_s"),
    Exported("ray_mm_train_time_fraction", "Share of the time that a phase took.", labels=(*_RUN, "phase"), of="time_fraction/"),
    Exported("ray_mm_train_mfu", "Share of the GPUs' operations that is the model's.", labels=_RUN, of="mfu"),
    Exported("ray_mm_train_replaced_samples", "Unusable samples since the workers started.", labels=_RUN, of="replaced_samples"),
    Exported("ray_mm_train_skipped_steps", "Updates left out since the workers started.", labels=_RUN, of="faults/skipped_steps"),
    Exported("ray_mm_train_rollbacks", "Returns to a checkpoint since then.", labels=_RUN, of="faults/rollbacks"),
    Exported("ray_mm_train_checkpoint_blocked_seconds", "What the last checkpoint held training up.", labels=_RUN, of=_CHECKPOINTED),
    Exported("ray_mm_train_checkpoint_write_seconds", "What the one before took to write.", labels=_RUN, of="checkpoint/last_write_s"),
)
TRAIN = (STEP, PLANNED_STEPS, CHECKPOINT_STEP, *FOLLOWED)

BLOCK_SAMPLES = Exported("ray_mm_data_samples_total", "Samples read and decoded for training.", Kind.COUNTER)
BLOCK_REPLACED = Exported("ray_mm_data_replaced_samples_total", "Of them, replaced as unusable.", Kind.COUNTER, ("reason",))
BLOCK_SECONDS = Exported("ray_mm_data_block_seconds", "Time to read and decode a block.", Kind.HISTOGRAM)
INDEX_SAMPLES = Exported("ray_mm_index_samples_total", "Usable samples that `mm data index` has read.", Kind.COUNTER)
INDEX_BAD = Exported("ray_mm_index_bad_samples_total", "Unusable ones.", Kind.COUNTER, ("reason",))
INDEX_BYTES = Exported("ray_mm_index_bytes_total", "Bytes of the shards that it has read.", Kind.COUNTER)
DATA = (BLOCK_SAMPLES, BLOCK_REPLACED, BLOCK_SECONDS, INDEX_SAMPLES, INDEX_BAD, INDEX_BYTES)


class RunGauges:
    """A run's gauges, in the process of rank 0; before it is there, of the command."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}

    def started(self, step: int, planned_steps: int) -> None:
        self._set(STEP, step)
        self._set(PLANNED_STEPS, planned_steps)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._set(STEP, step)
        if _CHECKPOINTED in metrics:
            self._set(CHECKPOINT_STEP, step)
        for each in FOLLOWED:
            if not each.of.endswith("/"):
                if each.of in metrics:
                    self._set(each, metrics[each.of])
                continue
            label = each.labels[-1]
            for name, value in metrics.items():
                if name.startswith(each.of):
                    self._set(each, value, **{label: name.removeprefix(each.of)})

    def _set(self, each: Exported, value: float, **labels: str) -> None:
        _made(each).set(float(value), self._run | labels)


def add(each: Exported, amount: float, **labels: str) -> None:
    """Count; nothing where there is nothing to count."""
    if amount:
        _made(each).inc(amount, labels)


def observe(each: Exported, value: float) -> None:
    _made(each).observe(value)


@cache
def _made(each: Exported) -> Any:
    """Ray's object for it; one per process."""
    from ray.util import metrics

    name = each.name.removeprefix(_PREFIX)
    match each.kind:
        case Kind.GAUGE:
            return metrics.Gauge(name, each.meaning, each.labels)
        case Kind.COUNTER:
            return metrics.Counter(name, each.meaning, each.labels)
        case Kind.HISTOGRAM:
            return metrics.Histogram(name, each.meaning, list(_BLOCK_SECONDS), each.labels)
