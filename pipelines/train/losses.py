"""Lost workers, as Train's controller sees them, written on the board. The controller loads this, so it is small."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.train import UserCallback

_LONGEST = 200


class ToldLosses(UserCallback):
    """Tells the board of every attempt that ended in an error."""

    def __init__(self, board: ray.actor.ActorHandle) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Waits for the board, which may decide that the next workers end at once."""
        with suppress(Exception):  # a failure here would end the run
            ray.get(self._board.lost.remote(_why(worker_exceptions)), timeout=10)


def _why(errors: Mapping[int, Exception]) -> str:
    """The line that says most: a rank whose process is gone before those that only missed it."""
    gone = [rank for rank, error in errors.items() if isinstance(error, ray.exceptions.RayActorError)]
    rank = min(gone or errors)
    lines = [line.strip() for line in str(errors[rank]).splitlines() if line.strip()] or [repr(errors[rank])]
    return f"rank {rank}: {lines[0].split('. ')[0] if gone else lines[-1][:_LONGEST]}"
