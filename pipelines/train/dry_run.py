"""`mm train --dry-run`: what a run would be, from its configuration, the index and the models it names. Nothing starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm_core.data.ledger import Source
from mm_core.data.plan import chunks_per_step
from pipelines.train.config import TrainRun
from pipelines.train.cost import cost_of, state_bytes, teacher_cost
from pipelines.train.parts import check_parts
from pipelines.train.preflight import check_run, start_of, with_sources
from pipelines.train.read_cost import Prices, read_cost
from pipelines.train.run_data import RunData


def describe(
    run: TrainRun, sources: Sequence[Source], *, prices: Prices | None = None, samples_per_s: float | None = None
) -> dict[str, Any]:
    """Parameters, steps, samples, epochs, shares and a memory estimate per worker; for data in an object store also requests, read
    amplification and what the reads cost.

    Raises:
        ConfigError, DataError, BundleError: what would stop the run before its first step.
    """
    data = RunData.open(sources)
    check_run(run, data)
    run = with_sources(run)
    check_parts(run)
    start_of(run)
    workers = run.resources.workers
    chunks = chunks_per_step(run.global_batch_size, run.data.chunk, workers)
    seen = data.plan(run).consumed(run.steps * chunks)
    epochs = {str(source): round(n / len(kept), 3) for source, kept, n in zip(data.sources, data.kept, seen, strict=True)}
    rank_batch = -(-chunks // workers) * run.data.chunk
    cost = cost_of(run, checkpointing=run.parallel.activation_checkpointing)
    state = state_bytes(run, cost)
    held, teacher = sum(state.values()), teacher_cost(run).bytes
    activations = min(rank_batch, run.parallel.micro_batch_size or rank_batch) * cost.activation_bytes
    samples = run.steps * run.global_batch_size
    reads = read_cost(data, run)
    return {
        "parameters": cost.parameters,
        "steps": run.steps,
        "global_batch_size": run.global_batch_size,
        "samples_per_rank_and_step": rank_batch,
        "samples_seen": samples,
        "samples_kept": sum(len(kept) for kept in data.kept),
        "epochs": epochs if len(epochs) > 1 else next(iter(epochs.values())),
        "memory_per_worker_mb": round((held + teacher + activations) / 1e6),
        "memory_weights_and_optimizer_mb": round((held - state["mean"]) / 1e6),
        "memory_teacher_mb": round(teacher / 1e6),
        "memory_mean_mb": round(state["mean"] / 1e6),
        "memory_activations_mb": round(activations / 1e6),
        **(reads.report(samples, prices or Prices(), samples_per_s) if reads else {}),
    }
