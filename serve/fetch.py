"""Pictures by URL, where that is allowed at all: from named hosts, over TLS, from public addresses on the very connection that is read,
without redirects, within a time and a size."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from serve.bounds import Hold
from serve.config import Fetching
from serve.problems import InputError

_PORT = 443
_PIECE_BYTES = 64 << 10
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052."""


def is_public(address: str) -> bool:
    """An address of the internet: not of this machine, a private network or a cloud's metadata, in whichever spelling."""
    ip = ipaddress.ip_address(address)
    inner = _inner(ip) if isinstance(ip, ipaddress.IPv6Address) else None
    return ip.is_global and not ip.is_multicast and (inner is None or inner.is_global)


def _inner(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The address that one of IPv6 is led on to: mapped, 6to4, NAT64."""
    translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    return ip.ipv4_mapped or ip.sixtofour or translated


class _PublicOnly(AbstractResolver):
    """What it returns is what is connected to: no second look-up comes between the check and the connection."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        addresses = [(str(address[0]), kind) for kind, _, _, _, address in found]
        if bad := [address for address, _ in addresses if not self._allowed(address)]:
            raise _NotPublicError(f"{host} leads to {bad[0]}, which is no public address")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for address, kind in addresses
        ]

    async def close(self) -> None:
        pass


class _NotPublicError(OSError):
    pass


class Fetcher:
    """`allowed` and `trust` are for tests, which have no public address and no certificate."""

    def __init__(
        self,
        config: Fetching,
        max_image_bytes: int,
        *,
        allowed: Callable[[str], bool] = is_public,
        trust: ssl.SSLContext | None = None,
        port: int = _PORT,
    ) -> None:
        self._config, self._max_bytes = config, max_image_bytes
        self._allowed, self._trust, self._port = allowed, trust, port

    def check_count(self, images: Sequence[str], name: str) -> None:
        """
        Raises:
            InputError: too many URLs in one call.
        """
        urls = sum(not image[:5].lower().startswith("data:") for image in images)
        if self._config.hosts and urls > self._config.max_urls:
            raise InputError(f"{name}: {urls:,} URLs in one call, at most {self._config.max_urls:,}", 413)

    async def fetch(self, url: str, name: str, hold: Hold) -> bytes:
        """The picture's bytes, not decoded.

        Raises:
            InputError: fetching is off, the URL is not allowed, or it could not be had.
            HTTPException: 429: what requests keep is too much with it.
        """
        self._check(url, name)
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s)
        connector = aiohttp.TCPConnector(
            resolver=_PublicOnly(self._allowed), use_dns_cache=False, force_close=True, ssl=self._trust or ssl.create_default_context()
        )
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, trust_env=False, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
                ) as session,
                session.get(url, allow_redirects=False, headers={"Accept": "image/jpeg, image/png, image/webp"}) as answer,
            ):
                if answer.status != 200:
                    raise InputError(f"{name}: {_short(url)} answers {answer.status}; redirects are not followed")
                return await self._body(answer, name, hold)
        except TimeoutError:
            raise InputError(f"{name}: {_short(url)} did not answer within {self._config.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = getattr(error, "os_error", error)  # what aiohttp says of a connection leaves the reason out
            raise InputError(f"{name}: {_short(url)} could not be fetched: {reason}") from None

    async def _body(self, answer: aiohttp.ClientResponse, name: str, hold: Hold) -> bytes:
        data = bytearray()
        async for piece in answer.content.iter_chunked(_PIECE_BYTES):
            hold(len(piece))
            data += piece
            if len(data) > self._max_bytes:
                raise InputError(f"{name}: a picture above {self._max_bytes:,} bytes", 413)
        return bytes(data)

    def _check(self, url: str, name: str) -> None:
        if not self._config.hosts:
            raise InputError(f"{name}: pictures are not fetched from URLs here; send a base64 data URI")
        try:
            parts = urlsplit(url)
            port = parts.port or _PORT
        except ValueError as error:
            raise InputError(f"{name}: {_short(url)} is no URL: {error}") from None
        if parts.scheme.lower() != "https" or port != self._port or parts.username is not None or parts.password is not None:
            raise InputError(f"{name}: a picture's URL is https://HOST/…, without a port or a password")
        host = (parts.hostname or "").rstrip(".").lower()
        if not any(_matches(host, pattern.lower()) for pattern in self._config.hosts):
            raise InputError(f"{name}: pictures are not fetched from {host[:100]!r}; allowed: {', '.join(self._config.hosts)}")
        if _is_address(host) and not self._allowed(host):  # which no resolver would see
            raise InputError(f"{name}: {host} is no public address")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _matches(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) and len(host) >= len(pattern) if pattern.startswith("*.") else host == pattern


def _short(url: str) -> str:
    return url if len(url) <= 100 else f"{url[:100]}…"
