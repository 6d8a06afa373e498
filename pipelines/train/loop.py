"""The training loop: what each Ray Train worker runs. Read it top to bottom.

Guarantees: a run that is killed anywhere and started again, on any number of workers, takes the same steps on the same global
batches; every rank takes the same number of steps; nothing that is not finite reaches a checkpoint.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from mm_core.data.plan import chunks_per_step, rank_counts
from mm_core.data.reader import ReadSpec
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import TwoTower
from mm_core.optim import build_optimizer, lay_out_state
from mm_core.ranks import Ranks
from mm_core.training.checkpoint import seed_step
from mm_core.training.clock import Phase, StepClock
from mm_core.training.ema import WeightMean
from mm_core.training.gpus import gpu_of
from mm_core.training.guard import StepGuard
from mm_core.training.parallel import parallelise
from mm_core.training.precision import autocast, prepare_blocks
from mm_core.training.step import StepResult, TrainStep
from mm_core.training.teacher import Teacher
from mm_core.training.transfer import Transfer
from mm_core.training.watchdog import Watchdog
from pipelines.batches import Share, StepBatch
from pipelines.stream import node_resources, stream
from pipelines.train.audit import Audit
from pipelines.train.board import fatal_errors
from pipelines.train.config import TrainRun
from pipelines.train.cost import cost_of, teacher_cost
from pipelines.train.evaluation import EvaluationTask, evaluation_of
from pipelines.train.meter import Meter
from pipelines.train.outcome import Outcome
from pipelines.train.parts import Model, inputs_of, objective_of, wrapped
from pipelines.train.remedies import LeftOut, Remedies, Rollback, is_left_out, not_finite, too_many_replaced
from pipelines.train.run_checkpoints import RunCheckpoints, is_taken_over, next_attempt
from pipelines.train.run_folder import check_shared
from pipelines.train.run_log import Preemption, RunLog, watching


@dataclass(frozen=True)
class WorkerTask:
    """All that a worker is told. The same on every rank and at every restart."""

    run: TrainRun
    spec: ReadSpec
    tokens: SpecialTokens | None
    """None of a model that reads no text."""
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
    """Where the ranks show the driver how far they are."""
    preemption_watched: bool
    """Whether Ray Train looks for nodes that are about to be taken away."""
    evaluation: EvaluationTask | None = None


def train_worker(task: WorkerTask) -> Outcome:
    with fatal_errors(task.board):
        # Ray Train starts workers again after any error; after one of ours they end at once, and the driver raises it.
        if (error := ray.get(task.board.error.remote())) is not None:
            return Outcome(0, {}, str(error))
        if dist.get_rank() == 0:
            task.board.joined.remote(dist.get_world_size())
        check_shared(task.folder, task.tracking_run_id)
        return _train(task)


def _train(task: WorkerTask) -> Outcome:
    run, rank = task.run, dist.get_rank()
    torch.set_num_threads(_threads())
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # batches are views of shared memory
    clock = StepClock(ray.train.torch.get_device())
    with RunLog(task, rank) as log, watching(task, clock) as watchdog:
        return _attempts(task, clock, log, watchdog, Remedies(run.faults, log.say))


def _attempts(task: WorkerTask, clock: StepClock, log: RunLog, watchdog: Watchdog, remedies: Remedies) -> Outcome:
    left_out: LeftOut = ()
    while not isinstance(ended := _attempt(task, clock, left_out, log, watchdog, remedies), Outcome):
        left_out = ended
        gc.collect()  # a model is in cycles of references, and the next one needs its memory
        torch.cuda.empty_cache()
    return ended


_TAKEN_OVER = "another command has gone on with it since, from the last checkpoint, and goes on; follow that one, or stop it and resume"


def _attempt(
    task: WorkerTask, clock: StepClock, left_out: LeftOut, log: RunLog, watchdog: Watchdog, remedies: Remedies
) -> Outcome | LeftOut:
    """How the run ended, or what the next attempt leaves out. Nothing here outlives it."""
    with closing(_Attempt(task, clock, left_out, log)) as attempt:
        ended = attempt.steps(watchdog, Preemption(task.preemption_watched), remedies)
        if not isinstance(ended, Outcome):
            if attempt.taken_over():
                return Outcome(ended.first, {}, _TAKEN_OVER, taken_over=True)
            return attempt.checkpoints.roll_back(ended)
        attempt.checkpoints.finish()
        return ended


class _Attempt:
    """From a checkpoint, or from the start, to the end or a rollback; what it needs is made anew, as if workers had been started again."""

    def __init__(self, task: WorkerTask, clock: StepClock, left_out: LeftOut, log: RunLog) -> None:
        self._task, self._log = task, log
        run = task.run

        # 1. Who this rank is, and its share of every global step.
        rank, world_size = dist.get_rank(), dist.get_world_size()
        chunks = chunks_per_step(run.global_batch_size, run.data.chunk, world_size)
        self._share = Share(rank, world_size, chunks)

        # 2. Model, objective, optimiser: equal on every rank, since the seed is.
        torch.manual_seed(run.seed)
        model = wrapped(run, build_model(run.model, task.tokens))
        if task.initial_weights is not None:
            model.model.load_state_dict(ray.get(task.initial_weights))
        self._step = build_step(run, model, clock, ray.get(task.teacher) if task.teacher else None)

        # 3. Where an earlier attempt stopped: weights, optimiser, step. The step gives schedule, random state and data cursor.
        self._ranks = Ranks(clock.device)
        self._number = next_attempt(task.folder, self._ranks)
        self._audit = Audit(task.audit, rank=rank, attempt=self._number) if task.audit else None
        self.checkpoints = RunCheckpoints(task, model, self._step, chunks, log.metrics, self._audit)
        self._start = self.checkpoints.restore(left_out)

    def steps(self, watchdog: Watchdog, preempted: Preemption, remedies: Remedies) -> Outcome | Rollback:
        # 4. The samples from there on, and the steps.
        task, first, run = self._task, self._start.step, self._task.run
        evaluate = evaluation_of(task.evaluation, self._step, run.steps, self._log.evaluated, self._log.warn)
        tools = LoopTools(self._log.metrics, evaluate, self._save, watchdog.step_done, preempted, self.taken_over, remedies)
        self._log.started(first)
        batches = stream(task.spec, self._share, first_step=first, last_step=run.steps, config=run.stream, cpus=_stream_cpus(run))
        return run_steps(run, self._step, batches, first, tools, left_out=self._start.left_out, audit=self._audit)

    def _save(self, step: int, metrics: dict[str, float], wait: bool) -> None:
        self._log.before_checkpoint()
        self.checkpoints.save(step, metrics, wait)

    def taken_over(self) -> bool:
        return is_taken_over(self._task.folder, self._number, self._ranks)

    def close(self) -> None:
        self.checkpoints.close()


def build_step(run: TrainRun, model: Model, clock: StepClock, teacher: TwoTower | None = None) -> TrainStep:
    """`model` on the clock's device, over all ranks, with its objective and optimiser."""
    rank, device = dist.get_rank(), clock.device
    model.attend_for(device)
    prepare_blocks(model.blocks(), run.precision, device)
    parallel = parallelise(model, run.parallel.kind, device, clock, blocks=model.blocks(), in_parts=model.trains_in_parts)
    around = partial(clock.phase, Phase.COLLECTIVE)
    teaching = None
    if teacher is not None:
        forward = partial(autocast, run.precision, device)
        teaching = Teacher(teacher.to(device), forward=forward, micro_batch_size=run.parallel.micro_batch_size)
    objective = objective_of(run, rank=rank, teacher=teaching, around=around)
    optimizer = build_optimizer(model, run.optimizer, blocks=model.blocks())
    if model.trains_in_parts:
        lay_out_state(optimizer)
    return TrainStep(
        parallel,
        objective,
        optimizer,
        optimizer_config=run.optimizer,
        schedule=run.schedule,
        total_steps=run.steps,
        counts=_counts(run),
        device=device,
        precision=run.precision,
        clock=clock,
        micro_batch_size=run.parallel.micro_batch_size,
        mean=None if run.ema_decay is None else WeightMean(parallel.module, run.ema_decay),
        guard=StepGuard(run.faults) if run.faults.looks_before_updating else None,
    )


def _counts(run: TrainRun) -> list[int]:
    """Samples of each rank in a step."""
    world_size = dist.get_world_size()
    return rank_counts(chunks_per_step(run.global_batch_size, run.data.chunk, world_size), run.data.chunk, world_size)


@dataclass(frozen=True)
class LoopTools:
    """What the steps call beside the model. By default nothing happens."""

    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    evaluate: Callable[[int], dict[str, float] | None] = lambda step: None
    """Called when an evaluation is due; what it has found at once goes into the checkpoint of its step."""
    save: Callable[[int, dict[str, float], bool], None] = lambda step, metrics, wait: None
    """(steps done, metrics, whether to wait until it is written)."""
    alive: Callable[[int], None] = lambda step: None
    """Told after every step which is the next one."""
    preempted: Callable[[], bool] = lambda: False
    """Asked at log steps, on all ranks: whether a node is about to be taken away."""
    taken_over: Callable[[], bool] = lambda: False
    """Asked before a checkpoint, on all ranks: whether another command trains this run now, whose checkpoints this one would spoil."""
    remedies: Remedies = field(default_factory=Remedies)


def run_steps(
    run: TrainRun,
    train_step: TrainStep,
    batches: Iterator[StepBatch],
    first_step: int,
    tools: LoopTools,
    *,
    left_out: LeftOut = (),
    audit: Audit | None = None,
) -> Outcome | Rollback:
    """The steps [first_step, run.steps) on this rank."""
    rank, clock = dist.get_rank(), train_step.clock
    to_device, inputs_from = Transfer(train_step.device), inputs_of(run, _counts(run), rank)
    meter = Meter(train_step, run.global_batch_size, _flops_per_sample(run, train_step))
    clock.read()  # up to here was start-up
    metrics: dict[str, float] = {}
    result: StepResult | None = None
    unchecked: tuple[StepBatch, torch.Tensor] | None = None
    for step in range(first_step, run.steps):
        with clock.phase(Phase.DATA_WAIT):
            batch = next(batches)
        applied = not is_left_out(step, left_out)
        if applied:
            with clock.phase(Phase.HOST_TO_DEVICE):
                inputs = inputs_from(batch, to_device)
            seed_step(run.seed, step, rank)
            result = train_step(inputs, step)
            if result.trouble is not None:
                applied = False
                if isinstance(ended := tools.remedies.apply(result, batch), Outcome | Rollback):
                    return ended
            elif run.faults.looks_before_updating:
                unchecked = None
            # The norm of the step before is read while this one's kernels run, so looking at it holds nothing up.
            elif unchecked and (failure := not_finite(*unchecked)):
                return Outcome(step, metrics, *failure)
            else:
                unchecked = (batch, result.grad_norm)
        meter.step_done(batch.replaced_in, result if applied else None)
        if audit:
            audit.add(batch, applied=applied)
        done = step + 1
        tools.alive(done)

        log_due = done % run.log_every_steps == 0 or done == run.steps
        save_due = done % run.checkpoint.every_steps == 0 or done == run.steps
        evaluation_due = run.evaluation.due(done, run.steps)
        # Before anything leaves the loop the last step is looked at too.
        if (log_due or save_due or evaluation_due) and unchecked and (failure := not_finite(*unchecked)):
            return Outcome(done, metrics, *failure)
        if log_due and result is not None:
            with clock.phase(Phase.LOGGING):
                metrics = meter.read(result) | tools.remedies.counts
                tools.log(done, metrics)
            if (reason := too_many_replaced(metrics, (done - first_step) * run.global_batch_size, run.data.max_bad_fraction)) is not None:
                return Outcome(done, metrics, reason, replaced=tuple(meter.top_shards()))
        found: dict[str, float] = {}
        if evaluation_due:
            with clock.phase(Phase.EVALUATION):
                found = tools.evaluate(done) or {}
        leaving = log_due and tools.preempted()
        if save_due or leaving:
            if tools.taken_over():
                return Outcome(done, metrics, _TAKEN_OVER, taken_over=True)
            with clock.phase(Phase.CHECKPOINT):
                tools.save(done, metrics | found, leaving or done == run.steps)
        if evaluation_due or save_due or leaving:
            tools.alive(done)  # their time is not the next step's
    return Outcome(run.steps, metrics, replaced=tuple(meter.top_shards()))


def _flops_per_sample(run: TrainRun, train_step: TrainStep) -> float | None:
    """Of the model's passes and a teacher's, on a GPU that there is a data sheet of, where every step takes the same."""
    if gpu_of(train_step.device) is None or train_step.model.module.trains_in_parts:
        return None
    cost = cost_of(run)
    return cost.forward_flops + cost.backward_flops + teacher_cost(run).flops


def _node_cpus() -> float:
    return node_resources().get("CPU", 1.0)


def _threads() -> int:
    """Compute threads of this worker: the node's CPUs divided among its workers."""
    return max(1, int(_node_cpus()) // ray.train.get_context().get_local_world_size())


def _stream_cpus(run: TrainRun) -> float:
    """CPUs this rank's read tasks may use, rounded down to Ray's granularity so that all ranks' shares fit."""
    share = run.stream.cpus_per_rank or _node_cpus() / ray.train.get_context().get_local_world_size()
    return math.floor(share * 1e4) / 1e4
