"""A training loop's samples and time between two log lines, as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from mm_core.data.problems import Reason
from mm_core.training.clock import Phase
from mm_core.training.gpus import gpu_of, mfu
from mm_core.training.step import StepResult, TrainStep
from pipelines.train.outcome import ShardCount

TOP_SHARDS = 1000


class Meter:
    """One per rank. `read` is a collective: one small all-reduce, at log steps only."""

    def __init__(self, train_step: TrainStep, global_batch_size: int, flops_per_sample: float | None = None) -> None:
        """`flops_per_sample`: of the model's forward and backward pass, where a share of the GPUs' operations is wanted."""
        self._gpu = None if flops_per_sample is None else gpu_of(train_step.device)
        self._flops_per_sample = flops_per_sample
        self._train_step, self._global_batch_size = train_step, global_batch_size
        self.replaced: Counter[str] = Counter()
        """Samples of this rank that were replaced since the run (re)started, by reason."""
        self._shards: Counter[tuple[str, str]] = Counter()
        """The same by shard and reason."""
        self._steps = 0
        self._terms: dict[str, Tensor] = {}
        self._measures: dict[str, Tensor] = {}
        """The last of each since the last reading: not every step has all of them."""

    def step_done(self, replaced: Mapping[tuple[str, str], int], result: StepResult | None) -> None:
        """
        Args:
            replaced: samples by shard and reason.
            result: None of a step that was left out.
        """
        self._steps += 1
        if result is not None:
            self._terms |= result.terms
            self._measures |= result.measures
        for (_, reason), samples in replaced.items():
            self.replaced[reason] += samples
        self._shards.update(replaced)
        if len(self._shards) > 8 * TOP_SHARDS:  # of millions of shards that all fail the first thousand tell enough
            self._shards = Counter(dict(self._shards.most_common(4 * TOP_SHARDS)))

    def top_shards(self) -> list[ShardCount]:
        """The shards with most replaced samples since the run (re)started, over all ranks, on rank 0; elsewhere nothing. A collective."""
        gathered: list[list[tuple[tuple[str, str], int]]] | None = None
        if dist.get_rank() == 0:
            gathered = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(self._shards.most_common(TOP_SHARDS), gathered)
        total = Counter[tuple[str, str]]()
        for counts in gathered or ():
            total.update(dict(counts))
        return [ShardCount(shard, reason, samples) for (shard, reason), samples in total.most_common(TOP_SHARDS)]

    def read(self, result: StepResult) -> dict[str, float]:
        """The metrics of the steps since the last call. Reading the tensors is a sync point: it is why this is not done at every
        step. Losses are those of the last step that has them, over the global batch; times are the mean over ranks."""
        device = self._train_step.device
        seconds = self._train_step.clock.read()
        names = [*(f"loss/{name}" for name in self._terms), *self._measures]
        local = [*(value.float() for value in (*self._terms.values(), *self._measures.values()))]
        times_and_counts = (*seconds.values(), *(float(self.replaced[reason]) for reason in Reason))
        local += [torch.tensor(value, device=device) for value in times_and_counts]
        summed = torch.stack([v.reshape(()).float() for v in local])
        dist.all_reduce(summed)
        values = summed.tolist()
        terms, times, replaced = values[: len(names)], values[len(names) : -len(Reason)], values[-len(Reason) :]
        metrics = dict(zip(names, terms, strict=True)) | {
            "loss": sum(terms[: len(self._terms)]),
            "lr": result.lr,
            "grad_norm": float(result.grad_norm),
            "samples_per_s": self._steps * self._global_batch_size / sum(seconds.values()),
            "replaced_samples": sum(replaced),
            "memory/rss_gb": psutil.Process().memory_info().rss / 1e9,
        }
        metrics |= {f"time_fraction/{phase}": time_s / sum(times) for phase, time_s in zip(Phase, times, strict=True)}
        metrics |= {f"replaced/{reason}": count for reason, count in zip(Reason, replaced, strict=True) if count}
        if (scale := self._train_step.logit_scale) is not None:
            metrics["logit_scale"] = float(scale)
        if device.type == "cuda":
            if self._gpu is not None and self._flops_per_sample is not None:
                metrics["mfu"] = mfu(metrics["samples_per_s"], self._flops_per_sample, self._gpu, dist.get_world_size())
            metrics["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        self._steps, self._terms, self._measures = 0, {}, {}
        return metrics
