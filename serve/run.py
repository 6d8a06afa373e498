"""Starting and stopping an endpoint on the Ray that the caller has connected to."""

from __future__ import annotations

import logging
import signal
import threading
from dataclasses import dataclass

import ray
import ray.serve
import torch
from ray.serve.config import HTTPOptions

from mm_core.bundle import load_bundle
from mm_core.errors import ServiceError
from serve.address import check_address
from serve.app import Served, build
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


@torch.no_grad()
def look_at(model: str, config: ServeConfig, *, name: str | None = None) -> Served:
    """What stands in the way of serving a bundle, found before Ray is needed. `name` is what answers call the model: by default the
    folder's name.

    Raises:
        BundleError: the model cannot be loaded.
        ServiceError: the address cannot be used.
    """
    check_address(config.host, config.port)
    bundle = load_bundle(model)
    return Served(model, name or bundle.name, bundle.embed_dim, bundle.logit_scale)


def start(served: Served, config: ServeConfig) -> Server:
    """Deploy what was looked at and wait until it answers.

    Raises:
        ServiceError: this Ray serves something already; nothing was started. Or the endpoint did not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if ray.is_initialized() and ray.serve.status().proxies:
        raise ServiceError("this Ray cluster serves applications already: stop them first (serve shutdown), or use another cluster")
    try:
        ray.serve.start(http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.request_timeout_s))
        ray.serve.run(build(served, config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        ray.serve.shutdown()
        raise ServiceError(f"the endpoint did not come up: {error}") from None
    return Server(config.url, served.name)
