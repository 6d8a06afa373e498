"""Every request as one line of a structured log, and in the numbers; each has an id, its caller's own where that sends one.

The id goes back with the answer by Ray Serve, which gives one to requests that have none.
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.measured import Measured

logger = logging.getLogger("ray.serve")
_ID = re.compile(r"[\w.\-]{1,100}")
_HEADER = "x-request-id"
_UNROUTED = "none"
_QUIET = ("/healthz", "/readyz", "/metrics")
_SAFE = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Access:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, measured: Measured) -> None:
        self._app, self._measured = app, measured

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _id_of(scope)
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        self._measured.running.inc()
        try:
            await self._app(scope, receive, noted)
        finally:
            self._measured.running.dec()
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", _UNROUTED)
            self._measured.request(route, status, seconds)
            if scope["path"] not in _QUIET:
                told = {name: state[name] for name in ("key", "model", "version", "inputs") if name in state}
                facts = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200], "status": status}
                logger.info("request", extra=facts | {"ms": round(seconds * 1e3, 2)} | told)


def _id_of(scope: Scope) -> str:
    given = dict(scope["headers"]).get(_HEADER.encode(), b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex
