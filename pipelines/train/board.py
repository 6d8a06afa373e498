"""Where rank 0 writes how far it is and the driver reads it: an actor of small messages, sent at log steps only.

In a module of its own, so that the actor's process loads neither torch nor the tracking client.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from mm_core.errors import MMError


class Board:
    """Progress, and the error that no restart would mend, if a worker met one."""

    def __init__(self) -> None:
        self._progress: tuple[int, dict[str, float]] | None = None
        self._error: MMError | None = None

    def update(self, step: int, metrics: dict[str, float]) -> None:
        self._progress = (step, metrics)

    def progress(self) -> tuple[int, dict[str, float]] | None:
        return self._progress

    def fail(self, error: MMError) -> None:
        self._error = self._error or error

    def error(self) -> MMError | None:
        return self._error


def start_board() -> ray.actor.ActorHandle:
    """On the driver's node, which outlives every worker's."""
    return ray.remote(num_cpus=0, label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()})(Board).remote()


@contextmanager
def fatal_errors(board: ray.actor.ActorHandle) -> Iterator[None]:
    """Write mm's own errors on the board: bad data or settings do not get better by starting workers again."""
    try:
        yield
    except MMError as error:
        ray.get(board.fail.remote(error))
        raise
