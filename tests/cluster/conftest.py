"""A real Ray head with its job service, token and TLS: started once for this package's tests, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from cluster.certificates import make_authority, make_node

_START_S = 60


@dataclass(frozen=True)
class RunningHead:
    """Where the head listens, and the environment in which a command can reach it."""

    address: str
    gcs_port: str
    environment: dict[str, str]
    metrics: str
    """What Prometheus reads of it."""
    logs: Path
    """All that its processes and jobs write."""


@pytest.fixture(scope="package")
def running_head() -> Iterator[RunningHead]:
    """`ray start --head --block` with a token and an authority of its own.

    Its folder's name is short, as the paths of Ray's sockets must fit 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="mmh"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    make_authority(folder / "ca")
    certificate = make_node(folder / "ca", folder / "tls")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **certificate.environment,
        "RAY_metrics_report_interval_ms": "200",
        "RAY_LOGGER_LEVEL": "warning",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    gcs, dashboard, client, metrics, agent = _free_ports(5)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2",
        "--include-dashboard=true", "--disable-usage-stats", "--object-store-memory=100000000", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}/r",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_up(process, address, token.read_text(), folder / "log")
            yield RunningHead(
                address, str(gcs), environment, f"http://127.0.0.1:{metrics}/metrics", folder / "r" / "session_latest" / "logs"
            )
        finally:
            _end(process)
    shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_until_up(process: subprocess.Popen[bytes], address: str, token: str, log: Path) -> None:
    """Until the job service answers and knows its own node."""
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            answer = requests.get(f"{address}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=5).json()
            if any(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"]):
                return
        except (requests.RequestException, ValueError, KeyError, TypeError):
            pass
        time.sleep(0.2)
    pytest.fail(f"the head did not come up: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL to whatever is left: `ray start --block` waits long for the workers of jobs that have ended."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    process.kill()
    process.wait()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(family, timeout=10)
