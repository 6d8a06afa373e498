"""Who is let in: API keys, of which only SHA-256 is kept. Keys are drawn, 256 bits each, so that a fast hash is enough.

A key comes as `Authorization: Bearer KEY`, as OpenAI's clients send it, or as the password of HTTP's basic authentication, for which a
browser asks by itself.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from mm_core.errors import ConfigError
from serve.problems import problem

ENVIRONMENT = "MM_API_KEYS"
"""`NAME=KEY` or `KEY`, divided by commas."""
OPEN = ("/healthz", "/readyz")
"""What a load balancer asks, which has no key."""
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_PORT = re.compile(r":\d+$")
_MIN_CHARACTERS = 16


def new_key() -> str:
    return f"mm-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, str]:
    """A file of lines `NAME SHA256`, as `mm serve-key` prints them; `#` begins a comment.

    Raises:
        ConfigError: it cannot be read, or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys in {path}: {error}") from None
    keys = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or len(words[1]) != 64 or set(words[1]) - set("0123456789abcdef"):
            raise ConfigError(f"{path} line {number} is not of the form NAME SHA256; `mm serve-key NAME` prints one")
        keys[words[0]] = words[1]
    if not keys:
        raise ConfigError(f"{path} holds no key: `mm serve-key NAME >> {path}` adds one")
    return keys


def parse_keys(value: str) -> dict[str, str]:
    """What `MM_API_KEYS` holds, hashed.

    Raises:
        ConfigError: a key that can be guessed.
    """
    keys = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in value.split(","))), 1):
        name, equals, key = entry.partition("=")
        name, key = (name, key) if equals else (f"key{number}", entry)
        if len(key) < _MIN_CHARACTERS:
            raise ConfigError(f"{ENVIRONMENT}: the key {name!r} has under {_MIN_CHARACTERS} characters; `mm serve-key NAME` draws one")
        keys[name] = digest(key)
    return keys


class Door:
    """ASGI middleware: who has no key is turned away, but from health. Without keys only a caller who names this machine is let in: a
    page of another site that a browser here shows cannot ask by a name of its own that leads here (DNS rebinding)."""

    def __init__(self, app: ASGIApp, keys: Mapping[str, str], needs_key: bool) -> None:
        self._app, self._names, self._needs_key = app, {value: name for name, value in keys.items()}, needs_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._needs_key:
            host = _PORT.sub("", headers.get(b"host", b"").decode("latin-1"))
            if host.lower() not in _LOCAL_HOSTS:
                detail = f"this endpoint answers on this machine alone, as localhost or 127.0.0.1, and was called {host[:100]!r}"
                await problem(421, detail)(scope, receive, send)
                return
        else:
            name = self._holder(headers.get(b"authorization", b"").decode("latin-1"))
            if name is None:
                detail = "no API key, or one that is not known: send Authorization: Bearer KEY"
                await problem(401, detail, {"WWW-Authenticate": 'Bearer, Basic realm="mm", charset="UTF-8"'})(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = name
        await self._app(scope, receive, send)

    def _holder(self, authorization: str) -> str | None:
        """The name of the key's holder."""
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif scheme.lower() != "bearer":
            return None
        found = digest(value.strip())
        return next((name for known, name in self._names.items() if hmac.compare_digest(known, found)), None)
