"""The Ray that a command starts for itself."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import psutil
import pytest
import ray

from mm_core.errors import ServiceError
from pipelines.session import connect


@pytest.mark.usefixtures("ray_cluster")
def test_an_embedded_ray_listens_on_loopback_alone_and_asks_for_a_token() -> None:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    assert is_token_auth_enabled()
    listening = {
        (process.name(), connection.laddr.ip)
        for process in of_this_ray()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name for name, _ in listening} >= {"gcs_server", "raylet"}
    assert not {(name, ip) for name, ip in listening if not is_loopback(ip)}


def of_this_ray() -> list[psutil.Process]:
    """Its services, which are told the session's folder, and what they have started; not the heads of other tests."""
    session = ray._private.worker._global_node.get_session_dir_path()
    services = [process for process in psutil.Process().children(recursive=True) if session in " ".join(process.cmdline())]
    return [*{child for service in services for child in (service, *service.children(recursive=True))}]


def is_loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def test_a_job_service_is_no_cluster_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RAY_ADDRESS may be for `mm submit`."""
    monkeypatch.setenv("RAY_ADDRESS", "http://me:geheim@10.0.0.5:8265")
    with pytest.raises(ServiceError, match="`mm submit -- COMMAND` runs the command there") as raised:
        connect()
    assert "geheim" not in str(raised.value)


def test_a_variable_that_the_job_was_given_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mm submit --env RAY_USAGE_STATS_ENABLED`: Ray refuses one that job and command both set, with the values of all in its message."""
    given = dict[str, Any]()
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options["runtime_env"]["env_vars"]))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {"RAY_USAGE_STATS_ENABLED": "1"}}}))
    connect()
    assert "RAY_USAGE_STATS_ENABLED" not in given
    assert given["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5"
