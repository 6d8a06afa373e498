"""A copy of the model that is lost is the server's fault, and passes: 503 with Retry-After, not 500."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from serve.app import Served, create_app
from serve.config import ServeConfig
from serve.encoder import Encoded, Unreadable

LOST = {
    "died": ActorDiedError(),
    "unreachable": ActorUnavailableError("no answer", None),
    "not deployed": DeploymentUnavailableError("Encoder"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_lost_copy_is_503(case: str) -> None:
    async def encode(_: Sequence[str | bytes]) -> Encoded | Unreadable:
        raise LOST[case]

    async def ping() -> None:
        raise LOST[case]

    async def ask() -> list[httpx.Response]:
        app = create_app(Served("runs/tiny", "tiny", 16, 100.0), ServeConfig(), encode, ping)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [await client.post("/v1/embeddings", json={"input": "x"}), await client.get("/healthz")]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) >= 1
        assert "lost" in answer.json()["detail"]
