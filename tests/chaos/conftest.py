from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.cluster import Nodes


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head with the driver, and one that has room for two workers."""
    nodes = Nodes(cpus=3, memory=4 << 30)
    yield nodes
    nodes.stop()
