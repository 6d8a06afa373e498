"""What a step of a run costs, as its own settings have it."""

from __future__ import annotations

from dataclasses import dataclass

from mm_core.models.pretrained import outline_of
from mm_core.objectives.classify import ClassifyConfig
from mm_core.optim import kept_numbers
from mm_core.training.cost import SampleCost, sample_cost, teacher_flops
from pipelines.train.config import TrainRun

FP32 = 4
"""Bytes of a number."""


def cost_of(run: TrainRun, *, checkpointing: bool = False) -> SampleCost:
    """`checkpointing`: count what is computed again, and not what is not kept."""
    return sample_cost(
        run.model,
        views=run.data.augment.views,
        captions=run.data.captions,
        frozen=run.towers.frozen,
        patch_dropout=run.towers.patch_dropout,
        checkpointing=checkpointing,
        classify=run.objective if isinstance(run.objective, ClassifyConfig) else None,
    )


@dataclass(frozen=True)
class TeacherCost:
    """Of a distillation's teacher, which every rank holds whole."""

    bytes: int = 0
    flops: float = 0.0
    """Of a sample."""


def teacher_cost(run: TrainRun) -> TeacherCost:
    """Nothing of a run without one.

    Raises:
        BundleError: the teacher is not there.
    """
    if run.teacher is None:
        return TeacherCost()
    model = outline_of(run.teacher)
    flops = teacher_flops(model, run.joint_model, views=run.data.augment.views, captions=run.data.captions)
    return TeacherCost(FP32 * sum(p.numel() for p in model.parameters()), flops)


def state_bytes(run: TrainRun, cost: SampleCost) -> dict[str, int]:
    """Of the undivided model, by part. What is not trained has weights alone."""
    numbers = {
        "weights": cost.parameters,
        "gradients": cost.trained_parameters,
        "optimizer": kept_numbers(run.optimizer.kind, parameters=cost.trained_parameters, matrices=cost.matrix_parameters),
        "mean": 0 if run.ema_decay is None else cost.trained_parameters,
    }
    return {part: number * FP32 for part, number in numbers.items()}
