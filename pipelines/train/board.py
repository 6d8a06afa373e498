"""Where the ranks write how far they are and what happened, and the driver reads it: an actor of small messages, sent at log steps only.

In a module of its own, so that the actor's process loads neither torch nor the tracking client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import ray

from mm_core.errors import MMError, TrainingError
from pipelines.train.goodput import Goodput

SHARE = "time_fraction/"
"""What the metrics of phases begin with."""


class News(NamedTuple):
    """What the driver did not know yet, and how far the run is."""

    step: int | None
    """None until the workers are about to take their first, and again once they are lost."""
    workers: int
    """That have begun since the last were lost: all, or none yet."""
    metrics: dict[str, float]
    said: list[str]
    goodput: dict[str, object]
    """As `Goodput.record` makes it."""


class Board:
    """Progress, messages, the run's time; and the error that no restart would mend, if a worker met one."""

    def __init__(self, goodput: Mapping[str, object], max_failures: int) -> None:
        """
        Args:
            goodput: what earlier commands of this run recorded.
            max_failures: how often in a row workers may be lost without a checkpoint between.
        """
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self._said: list[str] = []
        self._workers = 0
        self._max_failures = max_failures
        self._failures, self._first = 0, -1
        self._error: MMError | None = None
        self._goodput = Goodput.of(goodput)
        self._goodput.began(time.monotonic())

    def joined(self, workers: int) -> None:
        """So many have found each other."""
        self._step, self._workers = None, workers

    def lost(self, why: str, *, announced: bool) -> bool:
        """Workers ended that should not have. Returns whether the run gives up.

        Args:
            announced: with a node that was to be taken away, which is no failure.
        """
        self._failures += 0 if announced else 1
        if self._failures > self._max_failures:
            times = f"{self._failures} times in a row, without a checkpoint between (faults.max_failures)"
            self.fail(TrainingError(f"the workers were lost {times}; the last time: {why}"))
        elif self._error is None:
            self._said.append(f"workers were lost ({why}): all start again from the last checkpoint")
        self._step, self._workers = None, 0
        return self._failures > self._max_failures

    def started(self, step: int) -> None:
        """The workers are about to take `step`."""
        self._goodput.started(step, time.monotonic())
        if step > self._first:  # a newer checkpoint than the attempt before had
            self._failures = 0
        self._first = step
        self._step, self._metrics = step, {}

    def update(self, step: int, metrics: dict[str, float]) -> None:
        shares = {name.removeprefix(SHARE): value for name, value in metrics.items() if name.startswith(SHARE)}
        if shares:
            self._goodput.report(step, shares, time.monotonic())
        self._step = step
        self._metrics |= metrics

    def say(self, text: str) -> None:
        """Something for the person who watches."""
        self._said.append(text)

    def news(self) -> News:
        said, self._said = self._said, []
        return News(self._step, self._workers, self._metrics, said, self._goodput.record())

    def fail(self, error: MMError) -> None:
        self._error = self._error or error

    def error(self) -> MMError | None:
        return self._error


def start_board(goodput: Mapping[str, object], max_failures: int) -> ray.actor.ActorHandle:
    """On the driver's node, which outlives every worker's."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(Board).remote(goodput, max_failures)


@contextmanager
def fatal_errors(board: ray.actor.ActorHandle) -> Iterator[None]:
    """Write mm's own errors on the board: bad data or settings do not get better by starting workers again."""
    try:
        yield
    except MMError as error:
        ray.get(board.fail.remote(error))
        raise
