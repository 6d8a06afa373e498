"""A real Ray head with its job service, token and TLS: started once for this package's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.certificates import make_authority, make_node
from cluster.nodes import LocalCluster, Room


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
    cluster: LocalCluster


@pytest.fixture(scope="package")
def running_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHead]:
    """With an authority of its own."""
    folder, cluster = tmp_path_factory.mktemp("tls"), LocalCluster.new()
    make_authority(folder / "ca")
    certificate = make_node(folder / "ca", folder / "node")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))} | {
        **cluster.variables,
        **certificate.environment,
        "RAY_metrics_report_interval_ms": "200",
        "RAY_LOGGER_LEVEL": "critical",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    del environment["RAY_API_SERVER_ADDRESS"]  # commands name it, or do not
    cluster = cluster.add(Room(cpus=2, memory=4 << 30, object_store=100 << 20), environment)
    try:
        cluster.wait()
        metrics = f"http://127.0.0.1:{cluster.metrics_port}/metrics"
        logs = Path(cluster.folder, "0", "session_latest", "logs")
        yield RunningHead(cluster.address, str(cluster.gcs_port), environment, metrics, logs, cluster)
    finally:
        cluster.stop()
