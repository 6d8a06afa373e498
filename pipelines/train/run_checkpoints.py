"""A run's checkpoints, as its training loop sees them: save here, go on from there, go back."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from mm_core.errors import CheckpointError
from mm_core.ranks import Ranks
from mm_core.store import open_store, reaching, write_whole
from mm_core.training.checkpoint import CheckpointState, load_checkpoint, read_state
from mm_core.training.checkpoints import CheckpointFolder, CheckpointWriter
from mm_core.training.guard import StepGuard
from mm_core.training.step import TrainStep
from pipelines.train.audit import Audit
from pipelines.train.parts import Model
from pipelines.train.remedies import LeftOut, Rollback

if TYPE_CHECKING:
    from pipelines.train.loop import WorkerTask


class ResumePoint(NamedTuple):
    """Where the steps go on."""

    step: int
    left_out: LeftOut


class RunCheckpoints:
    """One per rank; every method but `close` is a collective."""

    def __init__(
        self,
        task: WorkerTask,
        model: Model,
        train_step: TrainStep,
        chunks_per_step: int,
        log: Callable[[int, dict[str, float]], None],
        audit: Audit | None = None,
    ) -> None:
        """`audit` is written before each checkpoint, so that no step before one is without its rows."""
        self._task, self._model, self._train_step, self._chunks = task, model, train_step, chunks_per_step
        self._log, self._audit = log, audit
        self._ranks = Ranks(train_step.device)
        self._folder = CheckpointFolder(task.folder)
        self._writer = CheckpointWriter(
            self._folder,
            model,
            train_step.optimizer,
            train_step.mean,
            retention=task.run.checkpoint,
            reach_back=task.run.faults.reach_back,
        )
        self._left_out: LeftOut = ()

    def save(self, step: int, metrics: dict[str, float], wait: bool) -> None:
        """Begin the checkpoint of after `step` steps.

        Raises:
            CheckpointError: as `CheckpointWriter.save`; the audit could not be written.
            RuntimeError: another rank is gone.
        """
        began = time.monotonic()
        if self._audit is not None:
            self._audit.flush()
        guard = self._train_step.guard
        state = CheckpointState(
            step=step,
            chunks_consumed=step * self._chunks,
            plan_fingerprint=self._task.spec.plan.fingerprint,
            data_fingerprint=self._task.data_fingerprint,
            config=self._task.run.model_dump(mode="json"),
            code_revision=self._task.code_revision,
            tracking_run_id=self._task.tracking_run_id,
            left_out=self._left_out,
            recent_losses=() if guard is None else guard.recent_losses,
        )
        self._writer.save(state, metrics, wait=wait)
        self._log(step, {"checkpoint/blocked_s": time.monotonic() - began, "checkpoint/last_write_s": self._writer.write_s})

    def restore(self, left_out: LeftOut = ()) -> ResumePoint:
        """Load the newest checkpoint, if there is one.

        Args:
            left_out: steps to leave out beside those that the checkpoint knows of.

        Raises:
            CheckpointError: it is damaged, or its data cursor is of another plan than this run's.
        """
        # A listing on another machine may be older.
        step = self._ranks.from_first(self._folder.newest() if self._ranks.rank == 0 else None)
        if step is None:
            self._left_out = left_out
            return ResumePoint(0, left_out)
        url = self._folder.at(step)
        state = read_state(url)
        if (state.plan_fingerprint, state.chunks_consumed) != (self._task.spec.plan.fingerprint, state.step * self._chunks):
            raise CheckpointError(
                f"the newest checkpoint of {self._task.folder} stopped at chunk {state.chunks_consumed:,} of another order of samples than"
                " this run's: it was written for other data, seed or batch size"
            )
        load_checkpoint(url, self._model, self._train_step.optimizer, self._train_step.mean)
        if self._train_step.guard is not None:
            self._train_step.guard = StepGuard(self._task.run.faults, state.recent_losses)
        self._left_out = tuple(sorted({*state.left_out, *left_out}))
        return ResumePoint(state.step, self._left_out)

    def roll_back(self, wanted: Rollback) -> LeftOut:
        """Remove the checkpoints from after the first step of `wanted`, but never the oldest. Returns what `restore` has to leave out."""
        self._writer.finish()
        target = None
        if self._ranks.rank == 0:
            steps = self._folder.steps()
            target = max((step for step in steps if step <= wanted.first), default=min(steps, default=0))
            self._folder.remove_after(target)
        target = self._ranks.from_first(target)
        return (*self._left_out, (max(target, wanted.first), wanted.last))

    def finish(self) -> None:
        """Wait for the one that is being written."""
        self._writer.finish()

    def close(self) -> None:
        self._writer.close()


def next_attempt(folder: str, ranks: Ranks) -> int:
    """How often this run has started workers or gone back, as rank 0 counts. A collective."""
    number = None
    if ranks.rank == 0:
        fs, path = open_store(f"{folder}/attempt")
        number = int(fs.cat_file(path)) + 1 if fs.exists(path) else 1
        write_whole(f"{folder}/attempt", str(number).encode())
    return int(ranks.from_first(number))


def is_taken_over(folder: str, attempt: int, ranks: Ranks) -> bool:
    """Whether workers of this run have been started since those of `attempt`, by another command: as after a head that was cut off, not
    lost. Where the store does not say, it is not. A collective."""
    found = None
    if ranks.rank == 0:
        with suppress(OSError), reaching(folder):
            fs, path = open_store(f"{folder}/attempt")
            found = int(fs.cat_file(path)) != attempt
    return bool(ranks.from_first(bool(found)))
