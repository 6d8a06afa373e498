"""The training loop: what each Ray Train worker runs. Read it top to bottom.

Guarantees: a run that is killed anywhere and started again, on any number of workers, takes the same steps on the same global
batches; every rank takes the same number of steps; nothing that is not finite reaches a checkpoint.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mm_core.data.plan import chunks_per_step, rank_counts
from mm_core.data.reader import ReadSpec
from mm_core.errors import CheckpointError
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.objectives.contrastive import build_objective
from mm_core.optim import build_optimizer
from mm_core.store import open_store, write_whole
from mm_core.training.checkpoint import CheckpointState, load_checkpoint, read_state, save_checkpoint, seed_step
from mm_core.training.clock import Phase, StepClock
from mm_core.training.ema import WeightMean
from mm_core.training.parallel import parallelise
from mm_core.training.step import TrainStep
from mm_core.training.transfer import Transfer
from pipelines.metric_log import MetricLog, spool_folder, system_metrics
from pipelines.stream import Share, StepBatch, stream
from pipelines.train.audit import Audit
from pipelines.train.board import fatal_errors
from pipelines.train.config import TrainRun
from pipelines.train.meter import Meter
from pipelines.train.outcome import Outcome


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker is told. The same on every rank and at every restart."""

    run: TrainRun
    spec: ReadSpec
    tokens: SpecialTokens
    folder: str
    """The run's folder (any fsspec URL)."""
    audit: str | None
    data_fingerprint: str
    code_revision: str
    tracking_run_id: str
    initial_weights: ray.ObjectRef | None
    """A state dict for `--init`, used where there is no checkpoint yet."""
    teacher: ray.ObjectRef | None
    """The `TwoTower` that a distillation learns from."""
    board: ray.actor.ActorHandle
    """Where rank 0 shows its progress to the driver."""


def train_worker(task: WorkerTask) -> Outcome:
    with fatal_errors(task.board):
        # Ray Train starts workers again after any error; after one of ours they end at once, and the driver raises it.
        if (error := ray.get(task.board.error.remote())) is not None:
            return Outcome(0, {}, str(error))
        return _train(task)


def _train(task: WorkerTask) -> Outcome:
    run = task.run
    torch.set_num_threads(_threads())
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # batches are views of shared memory

    # 1. Who this rank is, and its share of every global step.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    chunks = chunks_per_step(run.global_batch_size, run.data.chunk, world_size)
    share = Share(rank, world_size, chunks)

    # 2. Model, objective, optimiser: equal on every rank, since the seed is.
    torch.manual_seed(run.seed)
    model = TwoTower(build_model(run.model, task.tokens), mean=run.model.image_mean, std=run.model.image_std)
    if task.initial_weights is not None:
        model.model.load_state_dict(ray.get(task.initial_weights))
    train_step = build_step(run, model, device, ray.get(task.teacher) if task.teacher else None)

    # 3. Where an earlier attempt stopped: weights, optimiser, step. The step gives schedule, random state and data cursor.
    first_step = _restore(model, train_step, task, chunks)
    attempt = _next_attempt(task.folder, rank)

    # 4. The samples from there on, and the steps.
    batches = stream(task.spec, share, first_step=first_step, last_step=run.steps, config=run.stream, cpus=_stream_cpus(run))
    audit = Audit(task.audit, rank=rank, attempt=attempt) if task.audit else None

    def save(step: int, metrics: dict[str, float]) -> None:
        if audit:
            audit.flush()
        state = CheckpointState(
            step=step,
            chunks_consumed=step * chunks,
            plan_fingerprint=task.spec.plan.fingerprint,
            data_fingerprint=task.data_fingerprint,
            config=run.model_dump(mode="json"),
            code_revision=task.code_revision,
            tracking_run_id=task.tracking_run_id,
        )
        _save(model, train_step, state, rank, metrics)

    with _MetricSink(task, rank, first_step) as log:
        return run_steps(run, train_step, batches, first_step, log=log, save=save, audit=audit)


def build_step(run: TrainRun, model: TwoTower, device: torch.device, teacher: TwoTower | None = None) -> TrainStep:
    """`model` on its device, over all ranks, with its objective and optimiser."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    clock = StepClock(device)
    model.attend_for(device)
    if run.towers.frozen is not None:
        model.freeze(run.towers.frozen)
    if run.towers.patch_dropout:
        model.drop_patches(run.towers.patch_dropout)
    if run.parallel.activation_checkpointing:
        model.checkpoint_activations()
    parallel = parallelise(model, run.parallel.kind, device, clock, blocks=model.blocks())
    objective = build_objective(
        run.objective,
        rank=rank,
        teacher=None if teacher is None else teacher.to(device),
        around=partial(clock.phase, Phase.COLLECTIVE),
        block_bytes=run.parallel.logit_block_mb << 20,
    )
    return TrainStep(
        parallel,
        objective,
        build_optimizer(model, run.optimizer),
        optimizer_config=run.optimizer,
        schedule=run.schedule,
        total_steps=run.steps,
        counts=rank_counts(chunks_per_step(run.global_batch_size, run.data.chunk, world_size), run.data.chunk, world_size),
        device=device,
        precision=run.precision,
        clock=clock,
        micro_batch_size=run.parallel.micro_batch_size,
        mean=None if run.mean_decay is None else WeightMean(parallel.module, run.mean_decay),
    )


def run_steps(
    run: TrainRun,
    train_step: TrainStep,
    batches: Iterator[StepBatch],
    first_step: int,
    *,
    log: Callable[[int, dict[str, float]], None],
    save: Callable[[int, dict[str, float]], None],
    audit: Audit | None = None,
) -> Outcome:
    """The steps [first_step, run.steps) on this rank. `log` and `save` are called at the run's intervals and at its end."""
    rank, clock = dist.get_rank(), train_step.clock
    to_device = Transfer(train_step.device)
    meter = Meter(train_step, run.global_batch_size)
    clock.read()  # up to here was start-up
    metrics: dict[str, float] = {}
    unchecked: tuple[StepBatch, torch.Tensor] | None = None
    for step in range(first_step, run.steps):
        with clock.phase(Phase.DATA_WAIT):
            batch = next(batches)
        with clock.phase(Phase.HOST_TO_DEVICE):
            inputs = _inputs(batch, to_device)
        seed_step(run.seed, step, rank)
        result = train_step(inputs, step)
        meter.step_done(batch.replaced_in)
        if audit:
            audit.add(batch)
        # The norm of the step before is read while this one's kernels run, so looking at it holds nothing up.
        if unchecked and (failure := _not_finite(*unchecked)):
            return Outcome(step, metrics, *failure)
        unchecked = (batch, result.grad_norm)

        done = step + 1
        log_due = done % run.log_every_steps == 0 or done == run.steps
        save_due = done % run.checkpoint.every_steps == 0 or done == run.steps
        # Before anything leaves the loop the last step is looked at too.
        if (log_due or save_due) and (failure := _not_finite(*unchecked)):
            return Outcome(done, metrics, *failure)
        if log_due:
            with clock.phase(Phase.LOGGING):
                metrics = meter.read(result)
                log(done, metrics)
            if (reason := _too_many_replaced(metrics, (done - first_step) * run.global_batch_size, run.data.max_bad_fraction)) is not None:
                return Outcome(done, metrics, reason, replaced=tuple(meter.top_shards()))
        if save_due:
            with clock.phase(Phase.CHECKPOINT):
                save(done, metrics)
    return Outcome(run.steps, metrics, replaced=tuple(meter.top_shards()))


def _inputs(batch: StepBatch, to_device: Transfer) -> ImageTextBatch:
    assert batch.images is not None, "the driver lets only paired sources pass"
    assert batch.input_ids is not None, "the driver lets only paired sources pass"
    return ImageTextBatch(to_device(batch.images), to_device(batch.input_ids).long())


def _restore(model: TwoTower, train_step: TrainStep, task: WorkerTask, chunks_per_step: int) -> int:
    """Load the latest checkpoint, if there is one, and return the step to take next.

    Raises:
        CheckpointError: it is damaged, or its data cursor is of another plan than this run's.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = read_state(Path(folder))
        if (state.plan_fingerprint, state.chunks_consumed) != (task.spec.plan.fingerprint, state.step * chunks_per_step):
            raise CheckpointError(
                f"the newest checkpoint of {task.folder} stopped at chunk {state.chunks_consumed:,} of another order of samples than this"
                " run's: it was written for other data, seed or batch size"
            )
        load_checkpoint(Path(folder), model, train_step.optimizer, train_step.mean)
        return state.step


def _save(model: TwoTower, train_step: TrainStep, state: CheckpointState, rank: int, metrics: dict[str, float]) -> None:
    """Every rank writes its part into a folder of its own; Ray Train joins them in the run's folder, or keeps none of it."""
    # Named after the run, so that the next attempt removes what a killed one left.
    folder = Path(tempfile.gettempdir()) / f"mm-checkpoint-{state.tracking_run_id}-{rank}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        save_checkpoint(folder, model, train_step.optimizer, state, rank=rank, mean=train_step.mean)
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report({"step": state.step, **metrics}, checkpoint=checkpoint, checkpoint_dir_name=f"checkpoint_{state.step:08d}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _next_attempt(folder: str, rank: int) -> int:
    """How often this run has started workers. Rank 0 counts, all ranks hear."""
    shared: list[int] = [0]
    if rank == 0:
        fs, path = open_store(f"{folder}/attempt")
        shared[0] = int(fs.cat_file(path)) + 1 if fs.exists(path) else 1
        write_whole(f"{folder}/attempt", str(shared[0]).encode())
    dist.broadcast_object_list(shared)
    return shared[0]


_UIDS_SHOWN = 8


def _not_finite(batch: StepBatch, grad_norm: torch.Tensor) -> tuple[str, tuple[str, ...]] | None:
    """What to tell of a step whose gradient is not finite, with the uids of its batch, or None. All ranks see the same norm, so all take
    the same way."""
    if math.isfinite(grad_norm.item()):
        return None
    uids: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(uids, batch.rows["uid"].to_pylist())
    every = [uid for of_rank in uids for uid in of_rank]
    listed = ", ".join(every[:_UIDS_SHOWN]) + (" …" if len(every) > _UIDS_SHOWN else "")
    failure = (
        f"the gradient of step {batch.step} is not finite, training stopped before it reached a checkpoint; lower optimizer.lr, or look at"
        f" the samples of that batch, {len(every):,} listed in data/not_finite.json of its MLflow run: {listed}"
    )
    return failure, tuple(every)


def _too_many_replaced(metrics: dict[str, float], samples: int, bound: float) -> str | None:
    """What to tell where more of the samples read since the start had to be replaced than `bound`, or None."""
    replaced = metrics["replaced_samples"]
    if replaced <= bound * samples:
        return None
    reasons = ", ".join(f"{name.removeprefix('replaced/')} {n:,.0f}" for name, n in metrics.items() if name.startswith("replaced/"))
    return (
        f"{replaced:,.0f} of {samples:,} samples could not be read, above data.max_bad_fraction {bound}: {reasons};"
        " index the shards again, or look at their store"
    )


class _MetricSink:
    """Rank 0's metrics go to MLflow and to the driver's display; the other ranks' nowhere."""

    def __init__(self, task: WorkerTask, rank: int, first_step: int) -> None:
        self._task, self._rank, self._first_step = task, rank, first_step
        self._stack = ExitStack()
        self._log: MetricLog | None = None

    def __enter__(self) -> _MetricSink:
        if self._rank == 0:
            tracking = self._task.run.tracking
            self._log = MetricLog(tracking.uri, self._task.tracking_run_id, spool_folder(), step=self._first_step)
            self._stack.callback(self._log.close)
            if tracking.system_metrics:
                self._stack.enter_context(system_metrics(self._log, interval_s=tracking.system_metrics_interval_s))
            self._task.board.update.remote(self._first_step, {})
        return self

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if self._log is not None:
            self._log.log(step, metrics)
            self._task.board.update.remote(step, metrics)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _node_cpus() -> float:
    here = ray.get_runtime_context().get_node_id()
    return next((n["Resources"].get("CPU", 1.0) for n in ray.nodes() if n["NodeID"] == here), 1.0)


def _threads() -> int:
    """Compute threads of this worker: the node's CPUs divided among its workers."""
    return max(1, int(_node_cpus()) // ray.train.get_context().get_local_world_size())


def _stream_cpus(run: TrainRun) -> float:
    """CPUs this rank's read tasks may use, rounded down to Ray's granularity so that all ranks' shares fit."""
    share = run.stream.cpus_per_rank or _node_cpus() / ray.train.get_context().get_local_world_size()
    return math.floor(share * 1e4) / 1e4
