"""What keeps the endpoint up under load: requests at a time and bytes of a body are bounded before anything is parsed.

Ray Serve's own bound answers in plain text and replaces any handler the application has for it, so it is only the outer wall.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import overloaded, problem


class Bounds:
    """ASGI middleware. Health and documentation (GET) always pass."""

    def __init__(self, app: ASGIApp, max_requests: int, max_request_bytes: int) -> None:
        self._app, self._max_requests, self._max_request_bytes = app, max_requests, max_request_bytes
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._running >= self._max_requests:
            await overloaded(self._max_requests)(scope, receive, send)
            return
        if _content_length(scope) > self._max_request_bytes:
            await problem(413, self._too_large())(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, self._counted(receive), send)
        finally:
            self._running -= 1

    def _counted(self, receive: Receive) -> Receive:
        """A body sent in chunks tells no length: it is counted while it arrives."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_request_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is above {self._max_request_bytes:,} bytes: send fewer or smaller inputs in one call"


def _content_length(scope: Scope) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0
