"""Lost workers, as Train's controller sees them, written on the board. The controller loads this, so it is small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import UserCallback

_LONGEST = 200


class ToldLosses(UserCallback):
    """Tells the board of every attempt that ended in an error. What is raised here ends the run."""

    def __init__(self, board: ray.actor.ActorHandle) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """
        Raises:
            RuntimeError: the board gives up; why is its error.
            RayActorError: the board is gone, and with it who would end a run that cannot go on.
        """
        errors = {rank: _cause(error) for rank, error in worker_exceptions.items()}
        announced = any(getattr(error, "preempted", False) for error in errors.values())
        try:
            gives_up = ray.get(self._board.lost.remote(_why(errors), announced=announced), timeout=10)
        except GetTimeoutError:  # the machine is busy; it hears it later
            return
        if gives_up:
            raise RuntimeError("the run gives up")


def _cause(error: Exception) -> Exception:
    """Of a process that is gone Train says that it did not answer (`WorkerHealthCheckFailedError`), and Ray why."""
    cause = getattr(error, "health_check_failure", None)
    return cause if isinstance(cause, Exception) else error


def _why(errors: Mapping[int, Exception]) -> str:
    """The line that says most: of a rank whose process is gone before those that only missed it. Both say it last."""
    gone = [rank for rank, error in errors.items() if isinstance(error, RayActorError)]
    rank = min(gone or errors)
    lines = [line.strip() for line in str(errors[rank]).splitlines() if line.strip()] or [repr(errors[rank])]
    return f"rank {rank}: {lines[-1].split('. ')[0] if gone else lines[-1][:_LONGEST]}"
