"""`--workers 2..8` on a cluster whose nodes come and go: the run grows and shrinks with it, and learns from the same batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mm_core.data.index import Index
from tests.chaos.cluster import Nodes, Training

pytestmark = pytest.mark.chaos
STEPS, GLOBAL_BATCH = 800, 64
OF_A_NODE = 2
"""Workers, each of which books 256 MB."""
SETTINGS = (f"steps={STEPS}", f"global_batch_size={GLOBAL_BATCH}", "resources.resize_every_s=2")


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(cpus=2, memory=OF_A_NODE * 300 << 20)
    yield nodes
    nodes.stop()


@pytest.fixture
def index(corpus: Path, tmp_path: Path, nodes: Nodes) -> Index:
    return nodes.index(corpus / "train", tmp_path / "index")


def ranks_by_attempt(training: Training) -> dict[int, int]:
    """As the audit has them."""
    ranks: dict[int, set[int]] = {}
    for file in sorted(Path(training.audit).glob("*.parquet")):
        for row in pq.read_table(file, columns=["attempt", "rank"]).group_by(["attempt", "rank"]).aggregate([]).to_pylist():
            ranks.setdefault(row["attempt"], set()).add(row["rank"])
    return {attempt: len(of_one) for attempt, of_one in sorted(ranks.items())}


def test_a_run_grows_and_shrinks_with_the_cluster(index: Index, nodes: Nodes, tmp_path: Path) -> None:
    training = Training(index, tmp_path / "elastic", nodes, SETTINGS)
    training.folder.mkdir()
    training.start("2..8")

    def works_with(ranks: int) -> Callable[[], bool]:
        """On so many, for a checkpoint at least."""
        return lambda: [*ranks_by_attempt(training).values()][-1:] == [ranks]

    training.wait(works_with(2))
    nodes.add()
    training.wait(works_with(4))
    nodes.lose()
    training.wait(works_with(2))
    nodes.add()
    training.wait(works_with(4))
    training.wait(lambda: training.ended, timeout_s=600)

    undisturbed = Training(index, tmp_path / "undisturbed", nodes, SETTINGS)
    undisturbed.folder.mkdir()
    undisturbed.start(2)
    undisturbed.wait(lambda: undisturbed.ended, timeout_s=600)
    assert set(ranks_by_attempt(undisturbed).values()) == {2}
    assert sorted(training.consumed()) == list(range(STEPS))
    assert training.consumed() == undisturbed.consumed()
    assert abs(training.final_loss - undisturbed.final_loss) < 1e-2
    print(f"ranks of each attempt: {ranks_by_attempt(training)}; final loss {training.final_loss}, undisturbed {undisturbed.final_loss}")
    print(json.loads(training.read("goodput.json")))
