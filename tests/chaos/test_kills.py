"""Random faults of every role of a training run: what was consumed is what an undisturbed run consumes, and the loss ends where its does.

Two Ray nodes on this machine: a head with the driver, and one that holds the workers and can be lost. `make chaos` runs three seeds with
two faults of each role; `MM_CHAOS_OF_EACH=10 make chaos` ten of each. What each role costs is printed as a table.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from tests.chaos.cluster import Nodes, Training

pytestmark = pytest.mark.chaos
OF_EACH = int(os.environ.get("MM_CHAOS_OF_EACH", "2"))
STEPS = 160 * OF_EACH
"""A fault takes some fifteen; while a notice of preemption runs, training goes on."""
GLOBAL_BATCH = 40
LOSS_TOLERANCE = 1e-2
"""Sums over one and two ranks are rounded differently."""
MOST_WORKERS, TIMEOUT_S, NOTICE_S = 2, 20, 3
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


class Fault(NamedTuple):
    role: Role
    step: int
    """Of the newest checkpoint before it."""
    at: float
    """Seconds of the clock, as what follows."""
    began_again: float
    """When workers were there again."""


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
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory, nodes: Nodes) -> Index:
    return nodes.index(corpus / "train", tmp_path_factory.mktemp("chaos") / "index")


@pytest.fixture(scope="module")
def undisturbed(index: Index, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(index, tmp_path_factory.mktemp("undisturbed"), nodes, SETTINGS)
    training.start(2)
    training.wait(lambda: training.ended, timeout_s=1200)
    return training


def strike(role: Role, training: Training, nodes: Nodes, draw: random.Random) -> float:
    """Returns when it struck."""
    if role is Role.PREEMPTED:
        nodes.announce_loss(NOTICE_S)
    at = time.time()
    match role:
        case Role.WORKER:
            draw.choice(nodes.workers()).send_signal(signal.SIGKILL)
        case Role.ALL_WORKERS:
            for worker in nodes.workers():
                with suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGKILL)
        case Role.RAYLET | Role.PREEMPTED:
            nodes.lose()
            nodes.add()
        case Role.HUNG:
            draw.choice(nodes.workers()).send_signal(signal.SIGSTOP)
        case Role.DRIVER:
            training.process.kill()
            training.process.wait()
            training.start(draw.randint(1, MOST_WORKERS))
    return at


def struck(training: Training, nodes: Nodes, draw: random.Random, roles: Sequence[Role]) -> Iterator[Fault]:
    """One after the other, each at a random moment, as soon as the run goes on after the one before."""
    for role in roles:
        after = training.step + draw.randint(1, 5)
        training.wait(lambda after=after: training.step >= after)
        time.sleep(draw.uniform(0, 0.5))
        training.wait(lambda: bool(nodes.workers()))
        assert not training.ended, f"over before {role} could be struck: raise STEPS"
        attempt, step = training.attempt[0], training.step
        at = strike(role, training, nodes, draw)
        training.wait(lambda attempt=attempt: training.attempt[0] > attempt)
        yield Fault(role, step, at, training.attempt[1])
        print(f"{role} at {step}: workers are there again after {training.attempt[1] - at:.1f} s", flush=True)


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


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_change_nothing_that_is_consumed(
    seed: int, index: Index, nodes: Nodes, undisturbed: Training, tmp_path: Path
) -> None:
    """Each run meets every role equally often, in random order, at random moments between checkpoints."""
    draw = random.Random(seed)
    roles = [role for role in Role for _ in range(OF_EACH)]
    draw.shuffle(roles)
    training = Training(index, tmp_path, nodes, SETTINGS, ENVIRONMENT)
    training.start(draw.randint(1, MOST_WORKERS))
    faults = list(struck(training, nodes, draw, roles))
    training.wait(lambda: training.ended, timeout_s=1200)

    found = training.consumed()
    assert sorted(found) == list(range(STEPS))
    assert found == undisturbed.consumed()
    assert abs(training.final_loss - undisturbed.final_loss) < LOSS_TOLERANCE
    epochs = Counter((epoch, uid) for step in found.values() for epoch, _, uid in step)
    samples = len(compile_kept(index))
    whole = STEPS * GLOBAL_BATCH // samples
    assert set(epochs.values()) == {1}
    assert all(sum(e == epoch for e, _ in epochs) == samples for epoch in range(whole))
    print(f"seed {seed}: {len(faults)} faults: " + ", ".join(f"{fault.role} at {fault.step}" for fault in faults))
    print(f"{STEPS} steps of {GLOBAL_BATCH}, every sample consumed once an epoch, in the batches of the undisturbed run")
    print(f"final loss {training.final_loss}, undisturbed {undisturbed.final_loss}")
    print(table(faults, training))
    print((training.run / "goodput.json").read_text())
    shutil.rmtree(tmp_path / "runs")
