"""Ray nodes of this machine that can be lost, and `mm train` as a process of its own on them, which goes on where it was stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from mlflow import MlflowClient
from mlflow.entities import Metric

from cluster.nodes import LocalCluster, Room
from mm_core.address import is_local
from mm_core.data.index import Index
from mm_core.store import open_store
from pipelines.train.audit import read_audit

_TOWER = "{width: 32, layers: 1, heads: 2}"
SETTINGS = (
    "data.chunk=8", "precision=fp32", "model.image_size=32", f"model.vision={_TOWER}", f"model.text={_TOWER}", "model.embed_dim=16",
    "tokenizer.vocab_size=320", "tracking.system_metrics=false", "log_every_steps=1", "checkpoint.every_steps=5",
)  # fmt: skip


_LOOK_S, _LOOK_AT_STORE_S = 0.05, 0.5
"""A store of this machine has a run to serve too."""


class Nodes:
    """A head with the driver, which has room for no worker, and equal nodes, which have room for some. At first there is one."""

    def __init__(self, *, cpus: int, memory: int, variables: dict[str, str] | None = None) -> None:
        """`variables`: that all processes have, Ray's own and the driver's."""
        small = 200 << 20
        self._each, self._variables = Room(cpus, memory, object_store=400 << 20), variables or {}
        self._cluster = LocalCluster.new().add(Room(1, small, small), self._own)
        try:
            self._cluster.wait()
            self.add()
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """In which a command runs on them."""
        return self._own | self._cluster.variables | {"RAY_ADDRESS": self._cluster.gcs_address}

    @property
    def _own(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | self._variables

    @property
    def logs(self) -> str:
        """Ray's own, of all nodes."""
        return "".join(file.read_text(errors="replace") for file in Path(self._cluster.folder).glob("*/session_*/logs/*") if file.is_file())

    def add(self) -> None:
        self._cluster = self._cluster.add(self._each, self._own)
        self._cluster.wait()

    def index(self, shards: Path | str, out: Path | str) -> Index:
        """Made on them."""
        command = [sys.executable, "-m", "mm", "data", "index", str(shards), "--out", str(out)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)
        return Index.open(str(out))

    def processes(self, name: str) -> list[psutil.Process]:
        """Whose title, which Ray gives by what they do, has `name` in it; of the nodes that can be lost."""
        return [process for node in self._cluster.nodes[1:] for process in node.processes() if name in _title(process)]

    def workers(self) -> list[psutil.Process]:
        """The ranks' processes."""
        return self.processes("RayTrainWorker")

    def lose(self) -> None:
        """The newest, with all that runs on it."""
        self._cluster = self._cluster.lose(self._cluster.nodes[-1])

    def announce_loss(self, notice_s: int) -> None:
        """Of the newest, as a cloud does before it takes a spot machine away; returns when the time is over."""
        node_id = self._cluster.joined()[self._cluster.nodes[-1].name]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self._cluster.gcs_address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", str(notice_s)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)
        time.sleep(notice_s)

    def stop(self) -> None:
        self._cluster.stop()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Training:
    """Started again it goes on."""

    def __init__(
        self,
        index: Index,
        folder: Path,
        nodes: Nodes,
        settings: Sequence[str],
        environment: dict[str, str] | None = None,
        tracking_uri: str | None = None,
        storage: Path | str | None = None,
        audit: str | None = None,
    ) -> None:
        """`tracking_uri`: by default a file in the folder; `storage` and `audit`: by default folders in it."""
        self.folder, self._index = folder, index
        run_storage = str(storage or folder / "runs")
        self.run = f"{run_storage}/tiny"
        self.audit = audit or str(folder / "audit")
        self._fs, self._path = open_store(self.run)
        self.tracking_uri = tracking_uri or f"sqlite:///{folder / 'mlflow.db'}"
        self._settings = [*SETTINGS, *settings, f"storage={run_storage}", f"tracking.uri={self.tracking_uri}"]
        self._environment = nodes.environment | (environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0

    def start(self, workers: int | str) -> None:
        command = [sys.executable, "-m", "mm", "train", "clip-tiny", "--data", self._index.url, "--name", "tiny", "--json"]
        command += ["--workers", str(workers), "--audit", self.audit]
        command += [item for setting in self._settings for item in ("--set", setting)]
        command += ["--resume"] if self._fs.exists(f"{self._path}/run.json") else []
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def read(self, name: str) -> str:
        """A file of the run's folder."""
        return str(self._fs.cat_file(f"{self._path}/{name}").decode())

    def fetch(self, name: str, to: Path) -> Path:
        """A folder of the run's folder, on this disk."""
        self._fs.get(f"{self._path}/{name}", str(to / name), recursive=True)
        return to / name

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def step(self) -> int:
        """Of the newest checkpoint."""
        with suppress(FileNotFoundError):  # of what is removed meanwhile, which may also make the listing short
            found = [int(path.split("/")[-2].split("_")[1]) for path in self._fs.glob(f"{self._path}/checkpoint_*/state.json")]
            self._step = max(self._step, *found, 0)
        return self._step

    @property
    def attempt(self) -> tuple[int, float]:
        """How often workers have begun, and when they last did, in seconds of the clock."""
        if not self._fs.exists(f"{self._path}/attempt"):
            return (0, 0.0)
        return (int(self.read("attempt") or 0), self._fs.modified(f"{self._path}/attempt").timestamp())

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
            time.sleep(_LOOK_S if is_local(self.run) else _LOOK_AT_STORE_S)

    @property
    def final_loss(self) -> float:
        (line,) = [line for line in self.log.splitlines() if line.startswith('{"run_id"')]
        return float(json.loads(line)["final_loss"])

    def points(self) -> list[Metric]:
        """Of the loss, as MLflow has them: of every step, and of the replayed ones again."""
        found: list[Metric] = MlflowClient(self.tracking_uri).get_metric_history(self._tracked, "loss")
        return found

    def artifacts(self) -> set[str]:
        """What MLflow keeps of the run beside its metrics."""
        client, found = MlflowClient(self.tracking_uri), set()
        folders: list[str | None] = [None]
        while folders:
            for item in client.list_artifacts(self._tracked, folders.pop()):
                (folders.append if item.is_dir else found.add)(item.path)
        return found

    @property
    def _tracked(self) -> str:
        return str(json.loads(self.read("run.json"))["tracking_run_id"])

    def finished_steps(self) -> list[tuple[float, int]]:
        """When each step was done, in seconds of the clock, the replayed ones too."""
        return sorted((point.timestamp / 1000, point.step) for point in self.points())

    def consumed(self) -> dict[int, list[tuple[int, int, str]]]:
        """Per step (epoch, position, uid), in the order of the global batch, from the highest attempt."""
        steps: dict[int, list[tuple[int, int, str]]] = {}
        for row in read_audit(self.audit).to_pylist():
            steps.setdefault(row["step"], []).append((row["epoch"], row["position"], row["uid"]))
        return steps
