"""Starting an endpoint: what stands in its way is one clear error, before anything is deployed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mm_core.errors import BundleError, ServiceError
from serve.address import free_port
from serve.cli import wanted_models
from serve.config import ServeConfig
from serve.run import Server, look_at, start
from serve.store import Folders


def test_a_port_in_use_is_named_before_the_model_is_looked_at() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} .*--port"):
            look_at(wanted_models(["no-such-model"], ()), ServeConfig(port=port), Folders())


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ServiceError, match=r"192\.0\.2\.77"):
        look_at(wanted_models(["no-such-model"], ()), ServeConfig(host="192.0.2.77", port=free_port()), Folders())


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        look_at(wanted_models([str(tmp_path / "absent")], ()), ServeConfig(port=free_port()), Folders())


def test_a_second_endpoint_on_the_same_ray_is_refused(server: Server, bundle_folder: Path) -> None:
    config = ServeConfig(port=free_port())
    with pytest.raises(ServiceError, match="already"):
        start(look_at(wanted_models([str(bundle_folder)], ()), config, Folders()))


def test_urls_that_a_browser_takes() -> None:
    assert ServeConfig(host="0.0.0.0", port=9).url == "http://127.0.0.1:9"
    assert ServeConfig(host="::1", port=9).url == "http://[::1]:9"
    assert ServeConfig(host="127.0.0.1").is_loopback
    assert not ServeConfig(host="0.0.0.0").is_loopback
