"""One optimisation step: forward, backward, clipping, update. No data, no tracking, no device sync.

The loop decides when; this decides how. Everything a step changes is in `model` and `optimizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from mm_core.errors import ConfigError
from mm_core.models.clip import ImageTextBatch
from mm_core.objectives.contrastive import ContrastiveObjective
from mm_core.optim import OptimizerConfig, clamp_logit_scale
from mm_core.schedule import ScheduleConfig, lr_at
from mm_core.training.clock import Phase, StepClock


class Precision(StrEnum):
    AUTO = "auto"
    """bf16 where the device computes in it, else fp32."""
    FP32 = "fp32"
    BF16 = "bf16"
    """autocast: bf16 matrix products, fp32 weights and reductions."""


@dataclass(frozen=True)
class StepResult:
    """What one step came to. Tensors stay on the device, so that reading them is the caller's choice of a sync point."""

    terms: dict[str, Tensor]
    """This rank's share of each loss term; the sum over ranks is the global batch's loss."""
    grad_norm: Tensor
    """Before clipping; the same on every rank, and not finite on all of them if it is on one."""
    lr: float


class TrainStep:
    """Calls itself once per global step, on every rank."""

    def __init__(
        self,
        model: nn.Module,
        objective: ContrastiveObjective,
        optimizer: torch.optim.Optimizer,
        *,
        optimizer_config: OptimizerConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        counts: Sequence[int],
        device: torch.device,
        precision: Precision,
        clock: StepClock,
    ) -> None:
        """`counts`: samples per rank of a global step; `model` is wrapped for data parallelism already."""
        self.model, self.objective, self.optimizer = model, objective, optimizer
        self._optimizer_config, self._schedule, self._total_steps = optimizer_config, schedule, total_steps
        self._counts, self.device, self.clock = list(counts), device, clock
        self._bf16 = _use_bf16(precision, device)

    def __call__(self, batch: ImageTextBatch, step: int) -> StepResult:
        lr = lr_at(self._schedule, self._optimizer_config.lr, step, self._total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.clock.phase(Phase.FORWARD):
            with self._autocast():
                output = self.model(batch)
            loss = self.objective(output, self._counts)
        with self.clock.phase(Phase.BACKWARD):
            self.optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
        with self.clock.phase(Phase.OPTIMIZER):
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._optimizer_config.grad_clip_norm)
            self.optimizer.step()
            clamp_logit_scale(self.model)
        return StepResult({name: term.detach() for name, term in loss.terms.items()}, grad_norm.detach(), lr)

    @property
    def logit_scale(self) -> Tensor:
        """The model's temperature factor, as it is now."""
        return next(p for name, p in self.model.named_parameters() if name.endswith("logit_scale")).detach().exp()

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._bf16 else nullcontext()


def _use_bf16(precision: Precision, device: torch.device) -> bool:
    supported = _computes_bf16(device)
    if precision is Precision.BF16 and not supported and device.type == "cuda":
        raise ConfigError("precision=bf16, but this GPU has no bfloat16; set precision=fp32")
    return supported if precision is Precision.AUTO else precision is Precision.BF16


def _computes_bf16(device: torch.device) -> bool:
    """GPUs from Ampere on; CPUs with AVX512-BF16 or AMX, where it is 1.6 times as fast (elsewhere it is emulated, and slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # new in 2.12
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
