"""One optimisation step: forward, backward, clipping, update. No data, no tracking, no device sync.

The loop decides when; this decides how. Everything a step changes is in `model` and `optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mm_core.models.blocks import as_written
from mm_core.models.logit_scale import clamp_logit_scale, scale_parameter
from mm_core.objectives.output import LossOutput, Objective
from mm_core.optim import OptimizerConfig
from mm_core.schedule import ScheduleConfig, lr_at
from mm_core.training.clock import Phase, StepClock
from mm_core.training.ema import WeightMean
from mm_core.training.gradient_cache import cached_backward, pieces_for
from mm_core.training.guard import StepGuard, Trouble
from mm_core.training.parallel import Parallel, clip_gradients, reshard
from mm_core.training.precision import Precision, autocast


@dataclass(frozen=True)
class StepResult:
    """What one step came to. Tensors stay on the device, so that reading them is the caller's choice of a sync point."""

    terms: dict[str, Tensor]
    """This rank's share of each loss term; the sum over ranks is the global batch's loss."""
    measures: dict[str, Tensor]
    """The same of what is logged beside the losses."""
    grad_norm: Tensor
    """Before clipping; the same on every rank, and not finite on all of them if it is on one."""
    lr: float
    trouble: Trouble | None = None
    """What the guard found; then the update was left out."""


class TrainStep:
    """Calls itself once per global step, on every rank."""

    def __init__(
        self,
        model: Parallel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        optimizer_config: OptimizerConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        counts: Sequence[int],
        device: torch.device,
        precision: Precision,
        clock: StepClock,
        micro_batch_size: int | None = None,
        mean: WeightMean | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        """
        Args:
            counts: samples per rank of a global step.
            micro_batch_size: samples that go through the model at a time; None for all of a rank's.
            mean: is kept up to date.
            guard: looks at every step before its update.
        """
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self._optimizer_config, self._schedule, self._total_steps = optimizer_config, schedule, total_steps
        self._counts, self.device, self.clock = list(counts), device, clock
        self._autocast = partial(autocast, precision, device)
        self._autocast()  # refuses what the device lacks before the first step
        self.mean, self.guard = mean, guard
        self._pieces = 1 if micro_batch_size is None else pieces_for(self._counts, micro_batch_size)

    def __call__(self, batch: Any, step: int) -> StepResult:
        """Forward, backward and update on this rank's part of the global batch, but no update where the guard says so. A collective.

        Args:
            batch: what the objective takes, on the clock's device.
            step: counted from 0; it gives the learning rate.
        """
        lr = lr_at(self._schedule, self._optimizer_config.lr, step, self._total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch) if self._pieces == 1 else self._backward_in_pieces(batch)
        with self.clock.phase(Phase.OPTIMIZER):
            self.model.finish_gradients()
            grad_norm = clip_gradients(self.model.module.parameters(), self._optimizer_config.grad_clip_norm)
        trouble = self._judge(loss, grad_norm)
        if trouble is None:
            with self.clock.phase(Phase.OPTIMIZER):
                self.optimizer.step()
                clamp_logit_scale(self.model.module)
                if self.mean is not None:
                    self.mean.update(step)
        terms, measures = ({name: value.detach() for name, value in some.items()} for some in (loss.terms, loss.measures))
        return StepResult(terms, measures, grad_norm.detach(), lr, trouble)

    def _judge(self, loss: LossOutput, grad_norm: Tensor) -> Trouble | None:
        if self.guard is None:
            return None
        with self.clock.phase(Phase.COLLECTIVE):
            return self.guard.judge(loss, grad_norm)

    def _backward(self, batch: Any) -> LossOutput:
        with self.clock.phase(Phase.FORWARD):
            with self._autocast():
                output = self.model(batch)
            loss = self.objective(output, batch, self._counts)
        with self.clock.phase(Phase.BACKWARD):
            loss.total.backward()
        return loss

    def _backward_in_pieces(self, batch: Any) -> LossOutput:
        """Its time counts as backward: the second forward of each piece belongs to it, and the first is the smaller part."""
        with self.clock.phase(Phase.BACKWARD):
            return cached_backward(
                self.model, batch, lambda output: self.objective(output, batch, self._counts), self._pieces, forward=self._autocast
            )

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[Any], Any]]:
        """The model as it is evaluated: nothing dropped, no gradients, the mean of the weights where there is one. Afterwards
        everything is as it was. Where it is sharded, every call is a collective."""
        module = self.model.module
        training = module.training
        with nullcontext() if self.mean is None else self.mean.in_place():
            reshard(module)
            module.eval()
            try:
                with torch.no_grad(), self._autocast(), as_written():
                    yield module
            finally:
                module.train(training)
                reshard(module)

    @property
    def logit_scale(self) -> Tensor | None:
        """The factor of the model's logits, as it is now, if it has one. A collective where the model is sharded."""
        found = scale_parameter(self.model.module)
        if found is None:
            return None
        parameter = found.parameter.detach()
        return found.factor(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
