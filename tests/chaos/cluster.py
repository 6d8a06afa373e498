"""Ray nodes of this machine that can be lost, and `mm train` as a process of its own on them, which goes on where it was stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from mlflow import MlflowClient
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from mm_core.data.index import Index
from pipelines.train.audit import read_audit

if TYPE_CHECKING:
    from ray._private.node import Node

_TOWER = "{width: 32, layers: 1, heads: 2}"
SETTINGS = (
    "data.chunk=8", "precision=fp32", "model.image_size=32", f"model.vision={_TOWER}", f"model.text={_TOWER}", "model.embed_dim=16",
    "tokenizer.vocab_size=320", "tracking.system_metrics=false", "log_every_steps=1", "checkpoint.every_steps=5",
    "faults.max_failures=1000",
)  # fmt: skip


class Nodes:
    """A head with the driver, which has room for no worker, and equal nodes, which have room for some. At first there is one."""

    def __init__(self, *, cpus: float, memory: int) -> None:
        from ray.cluster_utils import Cluster

        small = 200 << 20
        self._each = {"num_cpus": cpus, "memory": memory, "object_store_memory": 400 << 20}
        self._cluster = Cluster(True, head_node_args={"num_cpus": 1, "memory": small, "object_store_memory": small})
        self.address = self._cluster.address
        self._nodes: list[Node] = []
        self.add()

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(**self._each))

    def workers(self) -> list[psutil.Process]:
        """The ranks' processes."""
        return [p for node in self._nodes for p in _raylet(node).children(recursive=True) if _is_rank(p)]

    def lose(self) -> None:
        """The newest, with all that runs on it."""
        node = self._nodes.pop()
        family = [_raylet(node), *_raylet(node).children(recursive=True)]
        self._cluster.remove_node(node, allow_graceful=False)
        psutil.wait_procs(family, timeout=30)

    def announce_loss(self, notice_s: int) -> None:
        """Of the newest, as a cloud does before it takes a spot machine away; returns when the time is over."""
        deadline = time.time_ns() // 1_000_000 + notice_s * 1000
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.address).drain_node(self._nodes[-1].node_id, reason, "spot", deadline)
        assert accepted, why
        time.sleep(notice_s)

    def stop(self) -> None:
        self._cluster.shutdown()


def _raylet(node: Node) -> psutil.Process:
    (info,) = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


class Training:
    """Started again it goes on."""

    def __init__(
        self, index: Index, folder: Path, address: str, settings: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        self.folder, self._index = folder, index
        self._settings = [*SETTINGS, *settings, f"storage={folder / 'runs'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"]
        self._environment = os.environ | {"RAY_ADDRESS": address} | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, workers: int | str) -> None:
        command = [sys.executable, "-m", "mm", "train", "clip-tiny", "--data", self._index.url, "--name", "tiny", "--json"]
        command += ["--workers", str(workers), "--audit", str(self.folder / "audit")]
        command += [item for setting in self._settings for item in ("--set", setting)]
        command += ["--resume"] if (self.run / "run.json").exists() else []
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        found = [int(path.parent.name.split("_")[1]) for path in self.run.glob("checkpoint_*/state.json")]
        return max(found, default=0)

    @property
    def attempt(self) -> tuple[int, float]:
        """How often workers have begun, and when they last did, in seconds of the clock."""
        file = self.run / "attempt"
        return (int(file.read_text() or 0), file.stat().st_mtime) if file.exists() else (0, 0.0)

    @property
    def ended(self) -> bool:
        return self.process.poll() == 0

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

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

    def finished_steps(self) -> list[tuple[float, int]]:
        """When each step was done, in seconds of the clock, the replayed ones too; as MLflow has them, over all attempts."""
        client = MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")
        run_id = json.loads((self.run / "run.json").read_text())["tracking_run_id"]
        return sorted((point.timestamp / 1000, point.step) for point in client.get_metric_history(run_id, "loss"))

    def consumed(self) -> dict[int, list[tuple[int, int, str]]]:
        """Per step (epoch, position, uid), in the order of the global batch, from the highest attempt."""
        steps: dict[int, list[tuple[int, int, str]]] = {}
        for row in read_audit(str(self.folder / "audit")).to_pylist():
            steps.setdefault(row["step"], []).append((row["epoch"], row["position"], row["uid"]))
        return steps
