"""Where a training loop's time and samples go between two log lines, and what of it is worth a metric."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist

from mm_core.data.problems import Reason
from mm_core.training.step import StepResult


class Meter:
    """One per rank. `read` is a collective: one small all-reduce, at log steps only."""

    def __init__(self, device: torch.device, global_batch_size: int) -> None:
        self._device, self._global_batch_size = device, global_batch_size
        self.replaced: Counter[str] = Counter()
        """Samples of this rank that were replaced since the run (re)started, by reason."""
        self._reset()

    def _reset(self) -> None:
        self._started, self._waited_s, self._saving_s, self._steps = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    @contextmanager
    def saving(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._saving_s += time.perf_counter() - started

    def step_done(self, replaced: Mapping[str, int]) -> None:
        self._steps += 1
        self.replaced.update(replaced)

    def read(self, result: StepResult, logit_scale: torch.Tensor) -> dict[str, float]:
        """The metrics of the steps since the last call. Reading the tensors is a sync point: it is why this is not done at every
        step. Losses are those of the last step, over the global batch; times are the mean over ranks."""
        elapsed_s = time.perf_counter() - self._started
        names = [f"loss/{name}" for name in result.terms]
        local = [*(term.float() for term in result.terms.values())]
        times_and_counts = (self._waited_s, self._saving_s, *(float(self.replaced[reason]) for reason in Reason))
        local += [torch.tensor(value, device=self._device) for value in times_and_counts]
        summed = torch.stack([v.reshape(()).float() for v in local])
        dist.all_reduce(summed)
        terms, (waited_s, saving_s, *replaced) = summed[: len(names)].tolist(), summed[len(names) :].tolist()
        world_size = dist.get_world_size()
        metrics = dict(zip(names, terms, strict=True)) | {
            "loss": sum(terms),
            "lr": result.lr,
            "logit_scale": float(logit_scale),
            "grad_norm": float(result.grad_norm),
            "samples_per_s": self._steps * self._global_batch_size / elapsed_s,
            "data_wait_fraction": waited_s / world_size / elapsed_s,
            "checkpoint_fraction": saving_s / world_size / elapsed_s,
            "replaced_samples": sum(replaced),
            "memory/rss_gb": psutil.Process().memory_info().rss / 1e9,
        }
        metrics |= {f"replaced/{reason}": count for reason, count in zip(Reason, replaced, strict=True) if count}
        if self._device.type == "cuda":
            metrics["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self._reset()
        return metrics
