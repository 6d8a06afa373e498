"""What keeps the endpoint up under load: requests at a time, their time and the bytes of their bodies are bounded before anything is
parsed.

Ray Serve's own bounds answer in plain text and replace any handler the application has for them, so they are only the outer wall.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import Bound
from serve.problems import full, overloaded, problem

Hold = Callable[[int], None]
"""Counts bytes that a request keeps until it is answered; raises 429 where all requests together then keep too many."""


class Bounds:
    """ASGI middleware. What is read (GET) always passes, but has its time."""

    def __init__(self, app: ASGIApp, bounds: Bound) -> None:
        self._app, self._bounds = app, bounds
        self._running = self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._timed(scope, receive, send)
        elif self._running >= self._bounds.max_requests:
            await overloaded(self._all_taken())(scope, receive, send)
        elif (length := _content_length(scope)) > self._bounds.max_request_bytes:
            await problem(413, self._too_large())(scope, receive, send)
        elif self._held_bytes + length > self._bounds.max_body_bytes:
            await overloaded(f"{self._held_bytes:,} bytes of requests are held")(scope, receive, send)
        else:
            await self._bounded(scope, receive, send)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = held = running = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            self._held_bytes += size
            if self._held_bytes > self._bounds.max_body_bytes:
                raise full(f"{self._held_bytes:,} bytes of requests are held")

        async def counted() -> Message:
            """A body sent in chunks tells no length: it is counted while it arrives. Only whose body is there takes a place: who sends half
            of one, or slowly, keeps nobody out."""
            nonlocal received, running
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._bounds.max_request_bytes:
                raise HTTPException(413, self._too_large())
            hold(len(message.get("body", b"")))
            if not running and not message.get("more_body", False):
                if self._running >= self._bounds.max_requests:
                    raise full(self._all_taken())
                running = 1
                self._running += 1
            return message

        scope.setdefault("state", {})["hold"] = hold
        try:
            await self._timed(scope, counted, send)
        finally:
            self._running -= running
            self._held_bytes -= held

    async def _timed(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(self._bounds.request_timeout_s):
                await self._app(scope, receive, noted)
        except TimeoutError:
            if begun:  # half an answer cannot become another
                raise
            detail = f"not answered within {self._bounds.request_timeout_s:g} s: send fewer inputs in one call, or try again"
            await problem(504, detail)(scope, receive, send)

    def _all_taken(self) -> str:
        return f"{self._bounds.max_requests:,} requests are being answered"

    def _too_large(self) -> str:
        return f"the body is above {self._bounds.max_request_bytes:,} bytes: send fewer or smaller inputs in one call"


def _content_length(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() and len(value) < 20 else 0
