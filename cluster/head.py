"""A Ray head's job service: where it is, whether it answers, and a client of it that shows the token Ray asks for.

An address that is given wins over the environment, which Ray's own client has the other way round. Every failure of the
service is a `ServiceError` of one line.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mm_core.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PROBE_TIMEOUT_S = 5.0
_MOST_NODES = 10_000
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKATIVE = (
    "ray._private.authentication.authentication_token_setup",
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)


@dataclass(frozen=True)
class Head:
    """A job service that answered, and the client to use with it."""

    address: str
    client: JobSubmissionClient

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Turn what Ray's client raises into one line.

        Raises:
            ServiceError: the head went away, refused the token, or refused the request.
        """
        with _one_line(self.address):
            yield

    def ray_version(self) -> str:
        """
        Raises:
            ServiceError: as `asked`.
        """
        with self.asked():
            found: str = self.client._do_request("GET", "/api/version").json()["ray_version"]
        return found

    def nodes(self) -> list[dict[str, Any]]:
        """Of Ray's state service: `state`, `node_ip` and `resources_total` of each node.

        Raises:
            ServiceError: as `asked`.
        """
        with self.asked():
            answer = self.client._do_request("GET", f"/api/v0/nodes?limit={_MOST_NODES}&detail=1&timeout=10").json()
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found


def choose_address(given: str | None, environment: Mapping[str, str] | None = None) -> str:
    """The job service's URL: as given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if that is a URL, else this machine's.

    Raises:
        ConfigError: not an http(s) URL (`ray://` and `HOST:6379` are other ports of the head), or one with a password.
    """
    env = os.environ if environment is None else environment
    if given is None:
        # RAY_ADDRESS usually names the port that drivers join by; only a URL can be the job service.
        named = [env[name] for name in _ADDRESS_VARIABLES if "://" in env.get(name, "")]
        given = named[0] if named else DEFAULT_ADDRESS
    parts = urlsplit(given)
    if parts.username or parts.password:
        raise ConfigError(f"the address of {parts.hostname} carries a password, which would be shown: use Ray's token instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{given!r} is not the URL of a head's job service: give http://HOST:8265, the port of its dashboard")
    return given.rstrip("/")


def is_this_machine(address: str) -> bool:
    """Whether the URL's host is an address of this machine. A tunnel from a local port looks the same."""
    host = urlsplit(address).hostname or ""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(_binds(str(ip)) for ip in addresses)


def connect(given: str | None = None) -> Head:
    """A client of the head.

    Raises:
        ServiceError: nobody answers at the address, or the head asks for a token there is not.
    """
    address = choose_address(given)
    _probe(address)
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    # `ray start` and `ray.init` turn token authentication on where ~/.ray/auth_token exists; the job client does not (Ray 2.60).
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    with _one_line(address), _environment(address):
        return Head(address, JobSubmissionClient(address))


def _probe(address: str) -> None:
    """Ray's client sets no timeout: against a host that drops packets it would hang for minutes."""
    import requests

    try:
        status = requests.get(f"{address}/api/version", timeout=PROBE_TIMEOUT_S, allow_redirects=False).status_code
    except requests.exceptions.SSLError:
        return
    except requests.RequestException as error:
        raise _unreachable(address, type(error).__name__) from None
    if status not in (200, 401, 403):
        raise ServiceError(f"{address} answers, but not as the job service of a Ray head (HTTP status {status}): check --address")


_FROM_AFAR = (
    "it listens on its own loopback unless `ray start --head` had --dashboard-host; open a tunnel, ssh -L 8265:localhost:8265 HEAD, and"
    " submit to that with --send-code"
)


def _unreachable(address: str, reason: str) -> ServiceError:
    here = is_this_machine(address)
    way_out = "start one with `ray start --head`, or name it with --address URL" if here else _FROM_AFAR
    return ServiceError(f"no Ray head answers at {address} ({reason}): {way_out}")


@contextmanager
def _one_line(address: str) -> Iterator[None]:
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise ServiceError(
            f"the Ray head at {address} asks for a token and this machine's is absent or another: "
            "put the head's into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
        ) from None
    except (ConnectionError, requests.RequestException) as error:
        raise _unreachable(address, type(error).__name__) from None
    except (RuntimeError, ValueError) as error:
        raise ServiceError(f"the Ray head at {address} refused: {_last_line(str(error))}") from None


def _last_line(text: str) -> str:
    """Ray quotes the server's traceback; its last line says what is wrong."""
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip()]
    return lines[-1].rstrip('".') if lines else "no reason given"


@contextmanager
def _environment(address: str) -> Iterator[None]:
    """RAY_API_SERVER_ADDRESS overrides the address that Ray's client is given: make them agree while it is built."""
    name = _ADDRESS_VARIABLES[0]
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _binds(ip: str) -> bool:
    """Only an address of this machine can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        try:
            probe.bind((ip, 0))
        except OSError:
            return False
    return True
