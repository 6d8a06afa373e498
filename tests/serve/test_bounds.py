"""A request takes one of the places once its body is there, and gives it back; who sends half of one keeps nobody out; what takes too long
is given up, and all bodies together are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from serve.app import create_app
from serve.config import Bound, ServeConfig
from serve.encoded import Encoded
from serve.inputs import Picture
from serve.measured import Measured
from serve.upstream import Part, Upstream
from tests.serve.test_lost import TRAFFIC, vectors

BODY = b'{"input": "x"}'


class Endpoint:
    """With two places, in this process; the model answers when it is let go."""

    def __init__(self, **bounds: Any) -> None:
        self.open = asyncio.Event()
        upstream = Upstream(100, Measured(), self._answer)
        upstream.follow(TRAFFIC)
        self._app = create_app(ServeConfig(bounds=Bound(**{"max_requests": 2} | bounds)), ["contrastive"], upstream)

    async def _answer(self, _: str, part: Part, inputs: Sequence[str | Picture]) -> Encoded:
        await self.open.wait()
        return vectors(len(inputs))

    def ask(self, *pieces: bytes, ends: bool = True, length: bool = False) -> asyncio.Task[int]:
        """The status that comes back; the body is sent in pieces, and never ends where it does not.

        Args:
            length: whether it is told beforehand.
        """
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages[-1]["more_body"] = not ends
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        headers += [(b"content-length", str(sum(map(len, pieces))).encode())] if length else []
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"", "query_string": b"", "headers": headers}
        scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "server": ("localhost", 80), "client": ("127.0.0.1", 9)}
        told: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            told.append(message)

        async def run() -> int:
            await self._app(scope, receive, send)
            return int(told[0]["status"])

        return asyncio.create_task(run())


async def later() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_who_sends_half_a_body_keeps_nobody_out() -> None:
    async def run() -> None:
        endpoint = Endpoint()
        halves = [endpoint.ask(BODY[:5], ends=False) for _ in range(20)]
        await later()
        whole = [endpoint.ask(BODY[:5], BODY[5:]) for _ in range(2)]
        await later()
        assert await endpoint.ask(BODY) == 429
        endpoint.open.set()
        assert await asyncio.gather(*whole) == [200, 200]
        assert await endpoint.ask(BODY) == 200
        for half in halves:
            assert not half.done()
            half.cancel()

    asyncio.run(run())


def test_a_place_is_looked_for_again_when_the_body_has_come() -> None:
    async def run() -> None:
        endpoint = Endpoint()
        asked = [endpoint.ask(BODY) for _ in range(3)]  # all three begin while two places are free
        await later()
        endpoint.open.set()
        assert sorted(await asyncio.gather(*asked)) == [200, 200, 429]

    asyncio.run(run())


def test_what_takes_too_long_is_given_up_and_leaves_its_place() -> None:
    async def run() -> None:
        endpoint = Endpoint(request_timeout_s=0.1)
        assert await asyncio.gather(*(endpoint.ask(BODY) for _ in range(2))) == [504, 504]
        assert await endpoint.ask(BODY[:5], ends=False) == 504
        endpoint.open.set()
        assert await endpoint.ask(BODY) == 200

    asyncio.run(run())


@pytest.mark.parametrize("length", [True, False], ids=["told beforehand", "counted as it comes"])
def test_all_bodies_together_are_bounded(length: bool) -> None:
    async def run() -> None:
        endpoint = Endpoint(max_body_bytes=3 * len(BODY) - 1, max_requests=9)
        held = [endpoint.ask(BODY, length=length) for _ in range(2)]
        await later()
        assert await endpoint.ask(BODY, length=length) == 429
        endpoint.open.set()
        assert await asyncio.gather(*held) == [200, 200]
        assert await endpoint.ask(BODY, length=length) == 200, "what was held is free again"

    asyncio.run(run())
