"""Starting an endpoint: what stands in its way is one clear error, before anything is deployed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mm_core.bundle import write_bundle
from mm_core.errors import BundleError, ConfigError, ServiceError
from mm_core.models.dvae import build_codebook, codebook_tiny
from mm_core.ports import free_port
from serve.cli import wanted_models
from serve.config import Compute, ServeConfig
from serve.fleet import bring_up, versions_there
from serve.run import Server, check_gpus, look_at, plan_of, start
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


def test_a_model_that_answers_nothing_is_named(tmp_path: Path) -> None:
    config = codebook_tiny()
    facts = {"recipe": "codebook-tiny", "data_fingerprint": "f" * 32, "metrics": {}}
    write_bundle(tmp_path / "book", model=build_codebook(config), tokenizer=None, config=config, **facts)
    with pytest.raises(BundleError, match=r"book has the task codebook.*contrastive, multitask"):
        look_at(wanted_models([str(tmp_path / "book")], ()), ServeConfig(port=free_port()), Folders())


def test_more_gpus_than_there_are_is_told(bundle_folder: Path) -> None:
    config = ServeConfig(compute=Compute(replicas=2, gpus_per_replica=0.5))
    plan = plan_of(wanted_models([f"a={bundle_folder}", f"b={bundle_folder}"], ()), config, Folders())
    check_gpus(plan, 2)
    with pytest.raises(ConfigError, match=r"2 GPUs .*2 models × 2 copies × 0\.5 each.* has 1: .*--gpus 0"):
        check_gpus(plan, 1)


def test_a_version_that_finds_no_room_is_refused_in_time(server: Server, bundle_folder: Path) -> None:
    """Else it would keep the others from being followed."""
    before, compute = versions_there(), Compute(gpus_per_replica=1, start_timeout_s=0.5)
    with pytest.raises(ServiceError, match=r"not up within 0\.5 s"):
        bring_up(str(bundle_folder), ServeConfig(compute=compute), Folders())
    assert versions_there() == before


def test_a_second_endpoint_on_the_same_ray_is_refused(server: Server, bundle_folder: Path) -> None:
    config = ServeConfig(port=free_port())
    with pytest.raises(ServiceError, match="already"):
        start(look_at(wanted_models([str(bundle_folder)], ()), config, Folders()))


def test_urls_that_a_browser_takes() -> None:
    assert ServeConfig(host="0.0.0.0", port=9).url == "http://127.0.0.1:9"
    assert ServeConfig(host="::1", port=9).url == "http://[::1]:9"
    assert ServeConfig(host="127.0.0.1").is_loopback
    assert not ServeConfig(host="0.0.0.0").is_loopback
