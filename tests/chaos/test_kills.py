"""Random faults of every role of a training run: what was consumed is what an undisturbed run consumes, and the loss ends where its does.

Two Ray nodes on this machine: a head with the driver, and one that holds the workers and can be lost. `make chaos` runs three seeds with
two faults of each role; `MM_CHAOS_OF_EACH=10 make chaos` ten of each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path

import psutil
import pytest
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from pipelines.index import build_index
from pipelines.train.audit import read_audit

pytestmark = pytest.mark.chaos
OF_EACH = int(os.environ.get("MM_CHAOS_OF_EACH", "2"))
GLOBAL_BATCH, CHUNK = 40, 8
LOSS_TOLERANCE = 1e-2
"""Sums over one, two, three and four ranks are rounded differently."""
_TOWER = "{width: 32, layers: 1, heads: 2}"
SETTINGS = [
    f"global_batch_size={GLOBAL_BATCH}", f"data.chunk={CHUNK}", "precision=fp32", "log_every_steps=5",
    "checkpoint.every_steps=5", "model.image_size=32", f"model.vision={_TOWER}", f"model.text={_TOWER}", "model.embed_dim=16",
    "tokenizer.vocab_size=320", "tracking.system_metrics=false", "faults.max_failures=1000", "faults.step_timeout_s=20",
]  # fmt: skip


ENVIRONMENT = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20"}
"""A rank alone that is stopped whole cannot tell, and no other waits for it: Ray Train finds it, by default after ten minutes."""


class Role(StrEnum):
    WORKER = "worker"
    ALL_WORKERS = "all workers"
    DRIVER = "driver"
    RAYLET = "raylet"
    HUNG = "hung worker"
    PREEMPTED = "preempted node"


STEPS = 220 * OF_EACH
"""A fault takes some twenty; while a notice of preemption runs, training goes on."""


class Nodes:
    """A head that has room for no worker, and a node that has room for all and is started again when it is killed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        small, store = 200 << 20, 200 << 20
        self._cluster = Cluster(True, head_node_args={"num_cpus": 1, "memory": small, "object_store_memory": store})
        self.address = self._cluster.address
        self._start()

    def _start(self) -> None:
        self.node = self._cluster.add_node(num_cpus=3, memory=4 << 30, object_store_memory=400 << 20)

    @property
    def raylet(self) -> psutil.Process:
        (info,) = self.node.all_processes["raylet"]
        return psutil.Process(info.process.pid)

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.raylet.children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]

    def lose(self) -> None:
        family = [self.raylet, *self.raylet.children(recursive=True)]
        self._cluster.remove_node(self.node, allow_graceful=False)
        psutil.wait_procs(family, timeout=30)
        self._start()

    def preempt(self, notice_s: int = 4) -> None:
        """Announce that the node is taken away, and take it away."""
        gcs = GcsClient(address=self.address)
        deadline = time.time_ns() // 1_000_000 + notice_s * 1000
        accepted, why = gcs.drain_node(self.node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline)
        assert accepted, why
        time.sleep(notice_s)
        self.lose()

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory, nodes: Nodes) -> Iterator[Index]:
    """Made by Ray on the same nodes."""
    import ray

    ray.init(address=nodes.address, log_to_driver=False)
    yield build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("chaos") / "index"))
    ray.shutdown()


class Training:
    """`mm train` as a process of its own, on the nodes; started again it goes on."""

    def __init__(self, index: Index, folder: Path, address: str) -> None:
        self.folder, self._index, self._address = folder, index, address
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, workers: int) -> None:
        settings = [*SETTINGS, f"steps={STEPS}", f"storage={self.folder / 'runs'}", f"tracking.uri=sqlite:///{self.folder / 'mlflow.db'}"]
        command = [
            sys.executable,
            "-m",
            "mm",
            "train",
            "clip-tiny",
            "--data",
            self._index.url,
            "--name",
            "tiny",
            "--workers",
            str(workers),
            "--json",
        ]
        command += ["--audit", str(self.folder / "audit"), *(item for setting in settings for item in ("--set", setting))]
        command += ["--resume"] if (self.folder / "runs" / "tiny" / "run.json").exists() else []
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": self._address} | ENVIRONMENT, stdout=log, stderr=log)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        found = [int(path.parent.name.split("_")[1]) for path in (self.folder / "runs" / "tiny").glob("checkpoint_*/state.json")]
        return max(found, default=0)

    def wait(self, done: Callable[[], bool], timeout_s: float = 300) -> None:
        end = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() in (None, 0), self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.05)

    @property
    def final_loss(self) -> float:
        (line,) = [line for line in self.log.splitlines() if line.startswith('{"run_id"')]
        return float(json.loads(line)["final_loss"])

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

    @property
    def ended(self) -> bool:
        return self.process.poll() == 0


def consumed(training: Training) -> dict[int, list[tuple[int, int, str]]]:
    """Per step (epoch, position, uid), in the order of the global batch, from the highest attempt."""
    steps: dict[int, list[tuple[int, int, str]]] = {}
    for row in read_audit(str(training.folder / "audit")).to_pylist():
        steps.setdefault(row["step"], []).append((row["epoch"], row["position"], row["uid"]))
    return steps


@pytest.fixture(scope="module")
def undisturbed(index: Index, nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(index, tmp_path_factory.mktemp("undisturbed"), nodes.address)
    training.start(2)
    training.wait(lambda: training.ended, timeout_s=1200)
    return training


def kill(role: Role, training: Training, nodes: Nodes, draw: random.Random) -> None:
    match role:
        case Role.WORKER:
            draw.choice(nodes.workers()).send_signal(signal.SIGKILL)
        case Role.ALL_WORKERS:
            for worker in nodes.workers():
                worker.send_signal(signal.SIGKILL)
        case Role.RAYLET:
            nodes.lose()
        case Role.HUNG:
            draw.choice(nodes.workers()).send_signal(signal.SIGSTOP)
        case Role.PREEMPTED:
            nodes.preempt()
        case Role.DRIVER:
            training.process.kill()
            training.process.wait()
            training.start(draw.randint(1, 4))


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_change_nothing_that_is_consumed(
    seed: int, index: Index, nodes: Nodes, undisturbed: Training, tmp_path: Path
) -> None:
    """Each run meets every role equally often, in random order, at random moments between checkpoints."""
    draw = random.Random(seed)
    roles = [role for role in Role for _ in range(OF_EACH)]
    draw.shuffle(roles)
    training = Training(index, tmp_path, nodes.address)
    training.start(draw.randint(1, 4))
    done: list[tuple[Role, int]] = []
    recovery_s: dict[Role, list[float]] = {role: [] for role in Role}
    for role in roles:
        after = training.step + draw.randint(1, 9)
        training.wait(lambda after=after: training.step >= after and bool(nodes.workers()))
        time.sleep(draw.uniform(0, 0.5))
        assert not training.ended, f"over before {role} could be killed, raise STEPS: {done}"
        at, moment = training.step, time.monotonic()
        done.append((role, at))
        kill(role, training, nodes, draw)
        # The preempted one's own checkpoint, a step or two later, is no recovery.
        training.wait(lambda at=at: training.step >= min(at + 3, STEPS))
        recovery_s[role].append(time.monotonic() - moment)
    training.wait(lambda: training.ended, timeout_s=1200)

    found = consumed(training)
    assert sorted(found) == list(range(STEPS))
    assert found == consumed(undisturbed)
    assert abs(training.final_loss - undisturbed.final_loss) < LOSS_TOLERANCE
    epochs = Counter((epoch, uid) for step in found.values() for epoch, _, uid in step)
    samples = len(compile_kept(index))
    whole = STEPS * GLOBAL_BATCH // samples
    assert set(epochs.values()) == {1}
    assert all(sum(e == epoch for e, _ in epochs) == samples for epoch in range(whole))
    print(f"seed {seed}: {len(done)} faults: " + ", ".join(f"{role} at {step}" for role, step in done))
    print(f"final loss {training.final_loss}, undisturbed {undisturbed.final_loss}")
    for role, seconds in recovery_s.items():
        print(f"{role}: next checkpoint after {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (longest)")
    print((training.folder / "runs" / "tiny" / "goodput.json").read_text())
    shutil.rmtree(tmp_path / "runs")
