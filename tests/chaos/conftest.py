from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cluster import Nodes
from tests.tracking_server import TrackingServer


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head with the driver, and one that has room for two workers."""
    nodes = Nodes(cpus=3, memory=4 << 30)
    yield nodes
    nodes.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    server.start()
    yield server
    server.kill()
