"""Ray nodes of this machine: real processes, each node with resources and a folder of its own, on loopback, behind a token.

`cluster.local` starts some that stay; tests start the same and lose them. A node is told by the session (setsid) that its processes
are in, so what somebody else started is never ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import requests

from mm_core.errors import ServiceError
from mm_core.ports import LOOPBACK, free_ports

_START_S, _GRACE_S, _CLOCK_S = 90.0, 3.0, 1.0
_LOOPBACK_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray 2.60 turns 127.0.0.1 into the machine's outer address, and then listens on all interfaces, but where it makes no clusters."""
_START = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True  # a node may join, after all
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""
_QUIET = {"RAY_LOGGER_LEVEL": "critical", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
"""Below `critical` Ray logs what jobs are given in variables: always at `info`, at `error` where it cannot make their environment."""


@dataclass(frozen=True)
class Room:
    """What a node has to give."""

    cpus: int
    memory: int
    """Bytes for tasks and actors that book some."""
    object_store: int
    """Bytes of shared memory."""


@dataclass(frozen=True)
class Node:
    """The processes of one `ray start --block`."""

    name: str
    pid: int
    """Of `ray start`, and of the session that all of them are in."""
    started_s: float
    """When it began, as the system has it: a number may be another process's by now."""

    @property
    def is_up(self) -> bool:
        """Whether `ray start` is there, which ends when a process it watches does."""
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.pid)
            return abs(leader.create_time() - self.started_s) < _CLOCK_S and leader.status() != psutil.STATUS_ZOMBIE
        return False

    def processes(self) -> list[psutil.Process]:
        """All that are left: those of the session, and the jobs and workers under them, whatever sessions those have."""
        with suppress(psutil.NoSuchProcess):
            if abs(psutil.Process(self.pid).create_time() - self.started_s) >= _CLOCK_S:
                return []
        found: dict[int, psutil.Process] = {}
        for process in _of_session(self.pid):
            with suppress(psutil.NoSuchProcess):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        return list(found.values())


@dataclass(frozen=True)
class LocalCluster:
    """Nodes that were started and not ended, the head first; `add`, `lose` and `stop` return what is there then."""

    folder: str
    """Of the token, the logs and Ray's own files. Short: the paths of Ray's sockets must fit 107 bytes."""
    gcs_port: int
    dashboard_port: int
    metrics_port: int
    nodes: tuple[Node, ...] = ()
    count: int = 0
    """Of nodes there ever were."""

    @classmethod
    def new(cls) -> LocalCluster:
        """With a token; nothing runs yet."""
        folder = Path(tempfile.mkdtemp(prefix="mmc"))
        with os.fdopen(os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        gcs, dashboard, metrics = free_ports(3)
        return cls(str(folder), gcs, dashboard, metrics)

    @property
    def address(self) -> str:
        """Of the job service."""
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    @property
    def gcs_address(self) -> str:
        """That drivers and nodes join by."""
        return f"{LOOPBACK}:{self.gcs_port}"

    @property
    def variables(self) -> dict[str, str]:
        """With which a command reaches the cluster."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{self.folder}/token",
            "RAY_API_SERVER_ADDRESS": self.address,
            **_LOOPBACK_ALONE,
        }

    def add(self, room: Room, environment: Mapping[str, str] | None = None) -> LocalCluster:
        """The head at first, then nodes that join it; `wait` awaits them. `environment`: what they start with, by default what this
        process has, without Ray's variables."""
        name = f"node{self.count}" if self.count else "head"
        if environment is None:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        command = [sys.executable, "-c", _START, "start", "--block", "--disable-usage-stats", f"--node-name={name}"]
        command += [f"--node-ip-address={LOOPBACK}", f"--temp-dir={self.folder}/{self.count}", *_resources(room)]
        command += [f"--address={self.gcs_address}", "--dashboard-agent-listen-port=0"] if self.count else self._head()
        with (Path(self.folder) / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**environment, **_QUIET, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = Node(name, process.pid, psutil.Process(process.pid).create_time())
        return replace(self, nodes=(*self.nodes, node), count=self.count + 1)

    def _head(self) -> list[str]:
        client, agent = free_ports(2)
        return [
            "--head", "--include-dashboard=true", f"--port={self.gcs_port}", f"--dashboard-port={self.dashboard_port}",
            f"--metrics-export-port={self.metrics_port}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        ]  # fmt: skip

    def wait(self, timeout_s: float = _START_S) -> None:
        """Until all nodes have joined.

        Raises:
            ServiceError: one ended, or the time is over; the end of its log is in it.
        """
        until = time.monotonic() + timeout_s
        while missing := {node.name for node in self.nodes} - self.joined().keys():
            ended = [node.name for node in self.nodes if not node.is_up]
            if ended or time.monotonic() > until:
                name = (ended or sorted(missing))[0]
                log = Path(self.folder) / f"{name}.log"
                raise ServiceError(f"{name} did not come up ({log}): {log.read_text(errors='replace').strip()[-1500:]}")
            time.sleep(0.2)

    def joined(self) -> dict[str, str]:
        """By name, the ids of the nodes that the head calls alive; none while it does not answer."""
        token = Path(self.folder, "token").read_text(encoding="utf-8")
        try:
            answer = requests.get(f"{self.address}/api/v0/nodes?detail=1", headers={"Authorization": f"Bearer {token}"}, timeout=5).json()
            found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        except (requests.RequestException, ValueError, KeyError, TypeError):
            return {}
        return {node["node_name"]: node["node_id"] for node in found if node["state"] == "ALIVE"}

    def lose(self, node: Node) -> LocalCluster:
        """A node with all that runs on it, at once, as if its plug were pulled."""
        _kill(node.processes())
        return replace(self, nodes=tuple(each for each in self.nodes if each != node))

    def stop(self) -> None:
        """End all nodes, and remove the folder."""
        family = [process for node in self.nodes for process in node.processes()]
        leaders = [process for process in family if process.pid in {node.pid for node in self.nodes}]
        for process in leaders:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(leaders, timeout=_GRACE_S)  # `ray start --block` waits long for the workers of jobs that have ended
        _kill([*family, *(process for node in self.nodes for process in node.processes())])
        shutil.rmtree(self.folder, ignore_errors=True)


def _resources(room: Room) -> Iterator[str]:
    yield from (f"--num-cpus={room.cpus}", f"--memory={room.memory}", f"--object-store-memory={room.object_store}")


def _of_session(session: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session:
                yield process


def _kill(processes: Iterable[psutil.Process]) -> None:
    family = list(processes)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=10)
