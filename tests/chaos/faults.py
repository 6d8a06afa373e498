"""What can strike a training run, and how long it takes to go on."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import psutil

from tests.chaos.cluster import Nodes, Training
from tests.tracking_server import TrackingServer

MOST_WORKERS, TIMEOUT_S, NOTICE_S, READING_S = 2, 10, 3, 60
OUTAGE_S = 120.0
"""Of the MLflow server. The faults that come next fall into it."""
SETTINGS = (f"faults.step_timeout_s={TIMEOUT_S}",)
ENVIRONMENT = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(TIMEOUT_S)}
"""A rank alone that is stopped whole cannot tell, and no other waits for it: Ray Train finds it, by default after ten minutes."""


class Role(StrEnum):
    WORKER = "worker"
    ALL_WORKERS = "all workers"
    DRIVER = "driver"
    RAYLET = "raylet"
    HUNG = "hung worker"
    PREEMPTED = "preempted node"
    TASK = "read task"
    TRACKING = "MLflow server"

    @property
    def ends_workers(self) -> bool:
        """Whether they begin again; else training goes on as it was."""
        return self not in (Role.TASK, Role.TRACKING)


class Fault(NamedTuple):
    role: Role
    step: int
    """Of the newest checkpoint before it."""
    at: float
    """Seconds of the clock, as what follows."""
    began_again: float
    """When workers were there again; as `at` where they were never gone."""


class Recovery(NamedTuple):
    seconds: float
    """From the fault to the end of the first step after it."""
    replayed: int
    """Steps that were done and had to be taken again."""


class Outage:
    """Of the MLflow server: it is killed, and started again after OUTAGE_S, while other faults go on."""

    def __init__(self, server: TrackingServer) -> None:
        self._server, self._end = server, threading.Timer(0, lambda: None)

    def begin(self) -> None:
        self.wait()
        self._server.kill()
        self._end = threading.Timer(OUTAGE_S, self._server.start)
        self._end.start()

    def wait(self) -> None:
        if self._end.ident is not None:
            self._end.join()


@dataclass(frozen=True)
class Scene:
    """What can be struck."""

    training: Training
    nodes: Nodes
    outage: Outage
    draw: random.Random

    def strike(self, role: Role) -> float:
        """Returns when it struck."""
        nodes, training, draw = self.nodes, self.training, self.draw
        if role is Role.PREEMPTED:
            nodes.announce_loss(NOTICE_S)
        victims = self._reading() if role is Role.TASK else nodes.workers()
        at = time.time()
        match role:
            case Role.WORKER | Role.TASK:
                draw.choice(victims).kill()
            case Role.ALL_WORKERS:
                for worker in victims:
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
            case Role.RAYLET | Role.PREEMPTED:
                nodes.lose()
                nodes.add()
            case Role.HUNG:
                draw.choice(victims).suspend()
            case Role.DRIVER:
                training.process.kill()
                training.process.wait()
                training.start(draw.randint(1, MOST_WORKERS))  # as its job does by itself (cluster/again.py), and on other workers besides
            case Role.TRACKING:
                self.outage.begin()
        return at

    def struck(self, role: Role) -> Fault:
        """Strike, and wait until there is a checkpoint of after it."""
        training = self.training
        attempt, step = training.attempt[0], training.step
        at = self.strike(role)
        if role.ends_workers:
            training.wait(lambda: training.attempt[0] > attempt)
        began_again = training.attempt[1] if role.ends_workers else at
        newest = training.step  # one may have been written just before the strike
        training.wait(lambda: training.step > newest)
        print(f"{role} at {step}: a checkpoint after {time.time() - at:.1f} s", flush=True)
        return Fault(role, step, at, began_again)

    def _reading(self) -> list[psutil.Process]:
        """As soon as one reads."""
        until = time.monotonic() + READING_S
        while not (found := self.nodes.processes("ReadPlan")):
            assert time.monotonic() < until, f"no read task was seen in {READING_S} s"
        return found


def recovery(fault: Fault, steps: Sequence[tuple[float, int]]) -> Recovery:
    before = max(done for done in steps if done[0] < fault.began_again)
    first = min(done for done in steps if done[0] >= fault.began_again)
    return Recovery(first[0] - fault.at, before[1] - (first[1] - 1))


def table(faults: Sequence[Fault], training: Training) -> str:
    """What each role cost, in Markdown."""
    steps = training.finished_steps()
    lines = ["| what is struck | faults | s to the next step, median | p90 | longest | steps replayed, median | most |"]
    lines.append("|---|---|---|---|---|---|---|")
    for role in sorted({fault.role for fault in faults}, key=[*Role].index):
        seconds, replayed = zip(*(recovery(fault, steps) for fault in faults if fault.role is role), strict=True)
        p90 = statistics.quantiles(seconds, n=10, method="inclusive")[8] if len(seconds) > 1 else seconds[0]
        figures = (f"{statistics.median(seconds):.1f}", f"{p90:.1f}", f"{max(seconds):.1f}", f"{statistics.median(replayed):g}")
        lines.append(f"| {' | '.join((role, str(len(seconds)), *figures, str(max(replayed))))} |")
    return "\n".join(lines)
