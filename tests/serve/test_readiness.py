"""An endpoint is not ready while a model has no copy that runs, beyond the moment in which one is replaced."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)

from serve.app import create_app
from serve.config import ServeConfig
from serve.fleet import Fleet, Wanted
from serve.measured import Measured
from serve.traffic import Traffic
from serve.upstream import Upstream
from tests.serve.test_lost import TRAFFIC

CONFIG = ServeConfig()


class Store:
    def pin(self, reference: str) -> str:
        return reference

    def fetch(self, reference: str) -> str:
        raise AssertionError("nothing is brought up")


class Copies:
    """What Serve says of a version with so many copies that hold its model."""

    encoders = 1

    def __call__(self) -> SimpleNamespace:
        parts = {"Encoder": self.encoders, "Preparer": 1}
        return SimpleNamespace(
            applications={
                "a": ApplicationStatusOverview(
                    status=ApplicationStatus.RUNNING,
                    message="",
                    last_deployed_time_s=0.0,
                    deployments={
                        name: DeploymentStatusOverview(
                            status=DeploymentStatus.HEALTHY,
                            status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
                            replica_states={ReplicaState.RUNNING: count} if count else {ReplicaState.STARTING: 1},
                            message="" if count else "RuntimeError: no GPU is left",
                        )
                        for name, count in parts.items()
                    },
                )
            }
        )


def readiness(traffic: Traffic) -> httpx.Response:
    upstream = Upstream(10, Measured(), lambda *_: asyncio.sleep(0))  # type: ignore[arg-type, return-value]
    upstream.follow(traffic)
    app = create_app(CONFIG, ["contrastive"], upstream)

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/readyz")

    return asyncio.run(request())


def test_a_model_without_a_copy_is_not_ready_and_keeps_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now, copies = [0.0], Copies()
    monkeypatch.setattr("ray.serve.status", copies)
    fleet = Fleet((Wanted("tiny", "runs/tiny"),), CONFIG, Store(), clock=lambda: now[0])
    fleet.resume(TRAFFIC)
    fleet.step()
    assert readiness(fleet.traffic).status_code == 200

    copies.encoders = 0
    fleet.step()
    assert readiness(fleet.traffic).status_code == 200, "one is on its way"
    now[0] += CONFIG.bounds.request_timeout_s + 1
    fleet.step()
    answer = readiness(fleet.traffic)
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    (model,) = answer.json()["models"]
    assert model["refused"] == "runs/tiny: no copy of Encoder runs: RuntimeError: no GPU is left"
    assert model["answers"] == {"runs/tiny": 100.0}, "requests find the next copy"

    copies.encoders = 1
    fleet.step()
    answer = readiness(fleet.traffic)
    assert (answer.status_code, answer.json()["models"][0]["refused"]) == (200, None)
