"""Random faults of every role of a training run: what was consumed is what an undisturbed run consumes, and the loss ends where its does.

Two Ray nodes on this machine: a head with the driver, and one that holds the workers and can be lost; shards and index in an S3 store,
which is slow and fails 5 % of the reads; an MLflow server. `make chaos` runs three seeds with five faults of each role, three quarters of
an hour; `MM_CHAOS_OF_EACH=1 make chaos` one of each, `MM_CHAOS_SEEDS=3,4 make chaos` other seeds. What each role costs is printed as a
table.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from mm_core.bundle import load_bundle
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.store import open_store
from tests.chaos.cluster import Nodes, Training
from tests.object_store import ObjectStore
from tests.tracking_server import TrackingServer

pytestmark = pytest.mark.chaos
OF_EACH = int(os.environ.get("MM_CHAOS_OF_EACH", "5"))
SEEDS = [int(seed) for seed in os.environ.get("MM_CHAOS_SEEDS", "0,1,2").split(",")]
STEPS = 400 * OF_EACH
"""A fault takes some fifteen; while a notice of preemption runs, training goes on."""
OUTAGE_S = 120.0
"""Of the MLflow server. The faults that come next fall into it."""
FAILING, LATENCY_S = 0.05, 0.05
"""Of the store's reads."""
GLOBAL_BATCH = 40
LOSS_TOLERANCE = 1e-5
"""Relative: sums over one and two ranks are rounded differently."""
MOST_WORKERS, TIMEOUT_S, NOTICE_S = 2, 10, 3
SETTINGS = (f"steps={STEPS}", f"global_batch_size={GLOBAL_BATCH}", f"faults.step_timeout_s={TIMEOUT_S}")
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


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(cpus=3, memory=4 << 30)
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def index(corpus: Path, object_store: ObjectStore, nodes: Nodes) -> Index:
    fs, path = open_store("s3://chaos/train")
    fs.mkdir("chaos")
    for shard in (corpus / "train").glob("*.tar"):
        fs.pipe_file(f"{path}/{shard.name}", shard.read_bytes())
    return nodes.index("s3://chaos/train", "s3://chaos/index")


@pytest.fixture
def failing_store(object_store: ObjectStore) -> Iterator[ObjectStore]:
    object_store.faults(fail=FAILING, latency_s=LATENCY_S)
    yield object_store
    object_store.faults()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def undisturbed(index: Index, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(index, tmp_path_factory.mktemp("undisturbed"), nodes, SETTINGS)
    training.start(2)
    training.wait(lambda: training.ended, timeout_s=1200)
    return training


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
                training.start(draw.randint(1, MOST_WORKERS))
            case Role.TRACKING:
                self.outage.begin()
        return at

    def _reading(self) -> list[psutil.Process]:
        """As soon as one reads."""
        until = time.monotonic() + TIMEOUT_S
        while not (found := self.nodes.processes("ReadPlan")):
            assert time.monotonic() < until, f"no read task was seen in {TIMEOUT_S} s"
        return found


def struck(scene: Scene, roles: Sequence[Role]) -> Iterator[Fault]:
    """One after the other, each at a random moment, as soon as the run goes on after the one before."""
    training = scene.training
    for role in roles:
        after = training.step + scene.draw.randint(1, 5)
        training.wait(lambda after=after: training.step >= after)
        time.sleep(scene.draw.uniform(0, 0.5))
        training.wait(lambda: bool(scene.nodes.workers()))
        assert not training.ended, f"over before {role} could be struck: raise STEPS"
        attempt, step = training.attempt[0], training.step
        at = scene.strike(role)
        if role.ends_workers:
            training.wait(lambda attempt=attempt: training.attempt[0] > attempt)
        began_again = training.attempt[1] if role.ends_workers else at
        training.wait(lambda step=step: training.step > step)
        yield Fault(role, step, at, began_again)
        print(f"{role} at {step}: a checkpoint after {time.time() - at:.1f} s", flush=True)


def in_order(draw: random.Random) -> list[Role]:
    """Every role equally often; an outage begins in the first half, so that it ends before the run does."""
    roles = [role for role in Role for _ in range(OF_EACH) if role is not Role.TRACKING]
    draw.shuffle(roles)
    for _ in range(OF_EACH):
        roles.insert(draw.randrange(len(roles) // 2), Role.TRACKING)
    return roles


def recovery(fault: Fault, steps: Sequence[tuple[float, int]]) -> Recovery:
    before = max(done for done in steps if done[0] < fault.began_again)
    first = min(done for done in steps if done[0] >= fault.began_again)
    return Recovery(first[0] - fault.at, before[1] - (first[1] - 1))


def table(faults: Sequence[Fault], training: Training) -> str:
    """What each role cost, in Markdown."""
    steps = training.finished_steps()
    lines = ["| what is struck | faults | s to the next step, median | p90 | longest | steps replayed, median | most |"]
    lines.append("|---|---|---|---|---|---|---|")
    for role in Role:
        seconds, replayed = zip(*(recovery(fault, steps) for fault in faults if fault.role is role), strict=True)
        p90 = statistics.quantiles(seconds, n=10, method="inclusive")[8] if len(seconds) > 1 else seconds[0]
        figures = (f"{statistics.median(seconds):.1f}", f"{p90:.1f}", f"{max(seconds):.1f}", f"{statistics.median(replayed):g}")
        lines.append(f"| {' | '.join((role, str(len(seconds)), *figures, str(max(replayed))))} |")
    return "\n".join(lines)


def each_point_came_once(training: Training) -> None:
    """A step has a point for each attempt that took it, at most, and no point is there twice."""
    points = [(point.step, point.timestamp, point.value) for point in training.points()]
    assert {step for step, _, _ in points} == set(range(1, STEPS + 1))
    assert len(set(points)) == len(points)
    assert max(Counter(step for step, _, _ in points).values()) <= training.attempt[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_faults_change_nothing_that_is_consumed(
    seed: int,
    index: Index,
    nodes: Nodes,
    undisturbed: Training,
    failing_store: ObjectStore,
    server: TrackingServer,
    tmp_path: Path,
) -> None:
    """Each run meets every role equally often, in random order, at random moments between checkpoints."""
    draw, outage = random.Random(seed), Outage(server)
    training = Training(index, tmp_path, nodes, SETTINGS, ENVIRONMENT, server.config.uri)
    training.start(draw.randint(1, MOST_WORKERS))
    faults = list(struck(Scene(training, nodes, outage, draw), in_order(draw)))
    outage.wait()
    assert not training.ended, "over before the MLflow server was back: raise STEPS"
    training.wait(lambda: training.ended, timeout_s=1200)

    found = training.consumed()
    assert sorted(found) == list(range(STEPS))
    assert found == undisturbed.consumed()
    assert training.final_loss == pytest.approx(undisturbed.final_loss, rel=LOSS_TOLERANCE)
    assert training.artifacts() == undisturbed.artifacts()
    load_bundle(str(training.run / "bundle"))
    epochs = Counter((epoch, uid) for step in found.values() for epoch, _, uid in step)
    samples = len(compile_kept(index))
    whole = STEPS * GLOBAL_BATCH // samples
    assert set(epochs.values()) == {1}
    assert all(sum(e == epoch for e, _ in epochs) == samples for epoch in range(whole))
    each_point_came_once(training)
    failed = failing_store.counts()["failed"]
    assert failed > 0
    print(f"seed {seed}: {len(faults)} recoveries: " + ", ".join(f"{fault.role} at {fault.step}" for fault in faults))
    print(f"{STEPS} steps of {GLOBAL_BATCH}, every sample consumed once an epoch, in the batches of the undisturbed run")
    print(f"{failed} failed reads of the store; no point of MLflow is lost or there twice")
    print(f"final loss {training.final_loss}, undisturbed {undisturbed.final_loss}")
    print(table(faults, training))
    print((training.run / "goodput.json").read_text())
    shutil.rmtree(tmp_path / "runs")
