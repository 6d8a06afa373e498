"""A copy of the model that is lost is the server's fault, and passes: asked once more, then 503 with Retry-After, never 500."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from serve.app import create_app
from serve.config import ServeConfig
from serve.encoded import Encoded
from serve.facts import Facts, Version
from serve.inputs import Picture
from serve.measured import Measured
from serve.prepare import Unreadable
from serve.traffic import Share, Slot, Traffic
from serve.upstream import Part, Upstream

FACTS = Facts(
    digest="d", task="contrastive", embed_dim=2, image_size=32, context_length=16, parameters=1, logit_scale=100.0, logit_bias=None
)
TRAFFIC = Traffic(
    slots=(Slot(name="tiny", shares=(Share(version=Version(application="a", reference="runs/tiny", facts=FACTS), percent=100),)),)
)
LOST = {
    "died": ActorDiedError(),
    "unreachable": ActorUnavailableError("no answer", None),
    "not deployed": DeploymentUnavailableError("Encoder"),
    "died before another": RayTaskError("encode", "traceback", ActorDiedError()),
    "its node took its answer along": RayTaskError("encode", "traceback", ObjectLostError("0" * 56, None, "call")),
    "died before another was asked": RayServeException("an upstream actor died before finishing a dependent task"),
}
LOST["died before another was asked"].__cause__ = ActorDiedError()
LOST["not deployed"].__cause__ = KeyError("Encoder")


def vectors(count: int) -> Encoded:
    return Encoded(np.eye(1, 2, dtype=np.float32).repeat(count, axis=0), np.ones(count, dtype=np.float32), count)


def ask(failures: list[Exception]) -> httpx.Response:
    """A request to a model that is lost so many times."""

    async def answer(_: str, part: Part, inputs: Sequence[str | Picture]) -> Encoded | Unreadable:
        if failures:
            raise failures.pop()
        return vectors(1)

    async def request() -> httpx.Response:
        config = ServeConfig()
        upstream = Upstream(config.bounds.max_waiting_inputs, Measured(), answer)
        upstream.follow(TRAFFIC)
        app = create_app(config, ["contrastive"], upstream)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://localhost") as client:
            return await client.post("/v1/embeddings", json={"input": "x"})

    return asyncio.run(request())


@pytest.mark.parametrize("case", LOST)
def test_a_lost_copy_is_asked_again(case: str) -> None:
    answer = ask([LOST[case]])
    assert answer.status_code == 200
    assert answer.json()["data"][0]["embedding"] == [1.0, 0.0]


@pytest.mark.parametrize("case", LOST)
def test_copies_lost_twice_are_503(case: str) -> None:
    answer = ask([LOST[case], LOST[case]])
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    assert "lost" in answer.json()["detail"]


@pytest.mark.parametrize("case", LOST)
def test_a_lost_searcher_is_asked_again(case: str) -> None:
    failures = [LOST[case]]

    async def about() -> dict[str, int]:
        if failures:
            raise failures.pop()
        return {"items": 3}

    async def request() -> httpx.Response:
        upstream = Upstream(10, Measured(), lambda *_: asyncio.sleep(0))  # type: ignore[arg-type, return-value]
        searcher = SimpleNamespace(about=SimpleNamespace(remote=about))
        app = create_app(ServeConfig(), ["contrastive"], upstream, searcher=searcher)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/v1/search")

    assert asyncio.run(request()).json() == {"items": 3}


def test_a_mistake_of_ours_is_500_and_is_not_asked_again() -> None:
    failures: list[Exception] = [ValueError("x"), ValueError("y")]
    assert ask(failures).status_code == 500
    assert len(failures) == 1


def test_without_an_index_there_is_no_search() -> None:
    upstream = Upstream(10, Measured(), lambda *_: asyncio.sleep(0))  # type: ignore[arg-type, return-value]
    assert not [path for path in create_app(ServeConfig(), ["contrastive"], upstream).openapi()["paths"] if "search" in path]
