"""Random faults of every role of a training run: what was consumed is what an undisturbed run consumes, and the loss ends where its does.

Two Ray nodes on this machine: a head with the driver, and one that holds the workers and can be lost; shards and index in an S3 store,
which is slow and fails 5 % of the reads; an MLflow server. `make chaos` runs three seeds with five faults of each role, more than an
hour; `MM_CHAOS_OF_EACH=1 make chaos` one of each, `MM_CHAOS_SEEDS=3,4 make chaos` other seeds. With `MM_CHAOS_IN_STORE=1` the first seed
strikes a second run too, whose own folder and audit are in that store, which then fails 5 % of the writes as well. What each role costs
is printed as a table.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mm_core.bundle import load_bundle
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.store import open_store
from tests.chaos import faults
from tests.chaos.cluster import Nodes, Training
from tests.chaos.faults import ENVIRONMENT, MOST_WORKERS, Fault, Outage, Role, Scene, table
from tests.object_store import ObjectStore
from tests.tracking_server import TrackingServer

pytestmark = pytest.mark.chaos
OF_EACH = int(os.environ.get("MM_CHAOS_OF_EACH", "5"))
SEEDS = [int(seed) for seed in os.environ.get("MM_CHAOS_SEEDS", "0,1,2").split(",")]
STEPS = 800 * OF_EACH
"""A fault takes some ten; while a notice of preemption runs, or an outage waits for the one before, training goes on, at 40 a second."""
FAILING, LATENCY_S, EVERY_WRITE = 0.05, 0.05, 20
"""Of the store's reads; which of its writes fail, where the run is there too."""
RUNS = [pytest.param(seed, None, id=str(seed)) for seed in SEEDS]
if os.environ.get("MM_CHAOS_IN_STORE"):
    RUNS.append(pytest.param(SEEDS[0], "s3://chaos/runs", id=f"{SEEDS[0]}-in-the-store"))
GLOBAL_BATCH = 40
LEAST_ROUNDING = 1e-5
"""Relative: of what sums over one and two ranks, rounded differently, come to at the end of a run."""
SETTINGS = (*faults.SETTINGS, f"steps={STEPS}", f"global_batch_size={GLOBAL_BATCH}")
IN_THE_STORE = ("faults.step_timeout_s=60", "checkpoint.every_steps=20", "stream.block_bytes=1000000")
"""A checkpoint waits for one write after another that fails, and is tried again by the store's library after some seconds. Steps are slow
then, and with blocks of the usual size all that a run of one fault each needs would be read in its first half."""


@pytest.fixture(scope="module")
def index(corpus: Path, object_store: ObjectStore, nodes: Nodes) -> Index:
    fs, path = open_store("s3://chaos/train")
    fs.mkdir("chaos")
    for shard in (corpus / "train").glob("*.tar"):
        fs.pipe_file(f"{path}/{shard.name}", shard.read_bytes())
    return nodes.index("s3://chaos/train", "s3://chaos/index")


@pytest.fixture
def failing_store(object_store: ObjectStore, storage: str | None) -> Iterator[ObjectStore]:
    object_store.faults(fail=FAILING, latency_s=LATENCY_S, every_write=EVERY_WRITE if storage else 0)
    yield object_store
    object_store.faults()


@pytest.fixture(scope="module")
def undisturbed(index: Index, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> list[Training]:
    """On as many workers as a disturbed run may have, by turns."""
    trainings = []
    for workers in range(1, MOST_WORKERS + 1):
        trainings.append(Training(index, tmp_path_factory.mktemp("undisturbed"), nodes, SETTINGS))
        trainings[-1].start(workers)
        trainings[-1].wait(lambda: trainings[-1].ended, timeout_s=1200)
    return trainings


def struck(scene: Scene, roles: Sequence[Role]) -> Iterator[Fault]:
    """One after the other, each at a random moment, as soon as the run goes on after the one before."""
    training = scene.training
    for role in roles:
        after = training.step + scene.draw.randint(1, 5)
        training.wait(lambda after=after: training.step >= after)
        time.sleep(scene.draw.uniform(0, 0.5))
        training.wait(lambda: bool(scene.nodes.workers()))
        assert not training.ended, f"over before {role} could be struck: raise STEPS"
        yield scene.struck(role)


def in_order(draw: random.Random) -> list[Role]:
    """Every role equally often; outages in as many stretches of equally many faults, in the first half of each, so that one is over
    before the next, and the last before the run is."""
    others = [role for role in Role if role is not Role.TRACKING]
    roles = others * OF_EACH
    draw.shuffle(roles)
    stretches = [roles[start : start + len(others)] for start in range(0, len(roles), len(others))]
    for stretch in stretches:
        stretch.insert(draw.randrange(len(others) // 2), Role.TRACKING)
    return [role for stretch in stretches for role in stretch]


def ends_alike(training: Training, undisturbed: Sequence[Training]) -> bool:
    """No farther from undisturbed runs than rounding takes those from each other."""
    losses = [other.final_loss for other in undisturbed]
    rounding = max(max(losses) - min(losses), LEAST_ROUNDING * min(losses))
    return min(losses) - rounding <= training.final_loss <= max(losses) + rounding


def each_point_came_once(training: Training) -> None:
    """A step has a point for each attempt that took it, at most, and no point is there twice."""
    points = [(point.step, point.timestamp, point.value) for point in training.points()]
    assert {step for step, _, _ in points} == set(range(1, STEPS + 1))
    assert len(set(points)) == len(points)
    assert max(Counter(step for step, _, _ in points).values()) <= training.attempt[0]


@pytest.mark.parametrize(("seed", "storage"), RUNS)
def test_random_faults_change_nothing_that_is_consumed(
    seed: int,
    storage: str | None,
    index: Index,
    nodes: Nodes,
    undisturbed: list[Training],
    failing_store: ObjectStore,
    server: TrackingServer,
    tmp_path: Path,
) -> None:
    """Each run meets every role equally often, in random order, at random moments between checkpoints."""
    draw, outage = random.Random(seed), Outage(server)
    settings = SETTINGS if storage is None else (*SETTINGS, *IN_THE_STORE)
    training = Training(index, tmp_path, nodes, settings, ENVIRONMENT, server.config.uri, storage, storage and "s3://chaos/audit")
    training.start(draw.randint(1, MOST_WORKERS))
    met = list(struck(Scene(training, nodes, outage, draw), in_order(draw)))
    outage.wait()
    assert not training.ended, "over before the MLflow server was back: raise STEPS"
    training.wait(lambda: training.ended, timeout_s=1200)
    counts = failing_store.counts()
    assert counts["failed"] > 0
    assert (counts["failed_writes"] > 0) == (storage is not None)
    failing_store.faults()  # what is there is looked at undisturbed

    found = training.consumed()
    assert sorted(found) == list(range(STEPS))
    print(f"final loss {training.final_loss}, undisturbed {[other.final_loss for other in undisturbed]}")
    assert all(found == other.consumed() for other in undisturbed)
    assert ends_alike(training, undisturbed)
    assert training.artifacts() == undisturbed[0].artifacts()
    load_bundle(training.fetch("bundle", tmp_path))
    epochs = Counter((epoch, uid) for step in found.values() for epoch, _, uid in step)
    samples = len(compile_kept(index))
    whole = STEPS * GLOBAL_BATCH // samples
    assert set(epochs.values()) == {1}
    assert all(sum(e == epoch for e, _ in epochs) == samples for epoch in range(whole))
    each_point_came_once(training)
    print(f"seed {seed}: {len(met)} recoveries: " + ", ".join(f"{fault.role} at {fault.step}" for fault in met))
    print(f"{STEPS} steps of {GLOBAL_BATCH}, every sample consumed once an epoch, in the batches of the undisturbed run")
    looks = "" if storage is None else " (of this test's looks at the run too)"
    print(f"of the store {counts['failed']} reads failed{looks} and {counts['failed_writes']} writes; no MLflow point lost or there twice")
    print(table(met, training))
    print(training.read("goodput.json"))
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
