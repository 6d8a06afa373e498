"""Starting and stopping an endpoint on the Ray that the caller has connected to."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import ray.serve
from ray.serve.config import HTTPOptions

from mm_core.bundle import load_bundle
from mm_core.errors import ServiceError
from serve.app import build
from serve.config import ServeConfig

APPLICATION = "mm"


@dataclass(frozen=True)
class Server:
    """A running endpoint."""

    url: str
    model: str

    def wait(self) -> None:
        """Until Ctrl-C or SIGTERM."""
        stop = threading.Event()
        previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(0.5):
                pass
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Take the endpoint down, letting running requests end; Ray stays."""
        ray.serve.delete(APPLICATION)
        ray.serve.shutdown()


def start(model: str, config: ServeConfig) -> Server:
    """Deploy a bundle and wait until it answers.

    Raises:
        BundleError: the model cannot be loaded; nothing was started.
        ServiceError: the port is taken.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    load_bundle(model)
    _check_port(config.host, config.port)
    ray.serve.start(http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.request_timeout_s))
    name = Path(model).name
    try:
        ray.serve.run(build(model, name, config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        ray.serve.shutdown()
        raise ServiceError(f"the endpoint did not come up: {error}") from None
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    return Server(f"http://{host}:{config.port}", model)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(f"port {port} of {host} cannot be used ({error.strerror}): stop what listens there, or give another --port") from None
