"""Messages between Ray's processes that are lost, by the switch that Ray tests itself with: what is consumed is what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.cluster import Nodes, Training

pytestmark = pytest.mark.chaos
STEPS, GLOBAL_BATCH = 400, 40
SETTINGS = (f"steps={STEPS}", f"global_batch_size={GLOBAL_BATCH}")
CALLS = (
    "NodeManagerService.grpc_client.RequestWorkerLease", "NodeManagerService.grpc_client.ReturnWorkerLease",
    "NodeManagerService.grpc_client.PinObjectIDs",
)  # fmt: skip
"""That Ray asks again. A call of an actor's method is not: whoever calls is told."""
EACH = {"num_failures": 1000, "req_failure_prob": 10, "resp_failure_prob": 10, "num_lower_bound_req_failures": 2}
"""Of each call and process: two requests at least, a tenth of them and of the answers, so many at most."""
LOST = {"RAY_testing_rpc_failure": json.dumps(dict.fromkeys(CALLS, EACH))}


def trained(corpus: Path, folder: Path, variables: dict[str, str] | None = None) -> tuple[Training, str]:
    """And what Ray logged."""
    folder.mkdir()
    nodes = Nodes(cpus=3, memory=4 << 30, variables=variables)
    try:
        index = nodes.index(corpus / "train", folder / "index")
        training = Training(index, folder, nodes, SETTINGS)
        training.start(2)
        training.wait(lambda: training.ended, timeout_s=1200)
        return training, nodes.logs
    finally:
        nodes.stop()


def test_lost_messages_change_nothing_that_is_consumed(corpus: Path, tmp_path: Path) -> None:
    undisturbed, _ = trained(corpus, tmp_path / "undisturbed")
    training, logs = trained(corpus, tmp_path / "lost", LOST)
    assert training.consumed() == undisturbed.consumed()
    assert training.final_loss == pytest.approx(undisturbed.final_loss, rel=1e-5)
    lost = {call: [logs.count(f"Inject RPC {what} failure for {call}") for what in ("request", "response")] for call in CALLS}
    print(f"lost requests and answers: {lost}; {training.attempt[0]} starts of the workers")
    assert all(requests > 0 for requests, _ in lost.values())
    assert sum(answers for _, answers in lost.values()) > 0
