"""A node of this machine is told from all else that runs here. Whole clusters are started in tests/e2e and tests/chaos."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from cluster.local import down, main, remembered
from cluster.nodes import LocalCluster, Node
from mm_core.errors import ConfigError, ServiceError
from mm_core.ports import free_ports

if TYPE_CHECKING:
    from conftest import RunningHead


def family() -> subprocess.Popen[bytes]:
    """Three processes: a session, one in it, and one under that with a session of its own, as jobs have."""
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen([sys.executable, "-S", "-c", outer], start_new_session=True)
    until = time.monotonic() + 120
    while len(psutil.Process(process.pid).children(recursive=True)) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    return process


def node_of(process: subprocess.Popen[bytes], name: str = "head") -> Node:
    return Node(name, process.pid, psutil.Process(process.pid).create_time())


def test_a_lost_node_loses_what_it_started_and_no_other_does() -> None:
    one, other = family(), family()
    node, cluster = node_of(one), LocalCluster("/nowhere", *free_ports(3), nodes=(node_of(one), node_of(other, "node1")))
    lost = node.processes()
    assert len(lost) == 3
    cluster = cluster.lose(node)
    assert not node.is_up
    assert not any(process.is_running() for process in lost)
    assert cluster.nodes == (node_of(other, "node1"),)
    assert len(cluster.nodes[0].processes()) == 3
    cluster.stop()
    assert cluster.nodes[0].processes() == []


def test_what_is_left_of_a_node_whose_first_process_is_gone_is_still_its_own() -> None:
    process = family()
    node = node_of(process)
    process.kill()
    process.wait()
    assert not node.is_up
    assert node.processes()
    LocalCluster("/nowhere", *free_ports(3), nodes=(node,)).stop()
    assert not node.processes()


def test_another_process_with_the_number_of_a_node_is_left_alone() -> None:
    process = family()
    earlier = Node("head", process.pid, psutil.Process(process.pid).create_time() - 3600)
    assert not earlier.is_up
    assert earlier.processes() == []
    LocalCluster("/nowhere", *free_ports(3), nodes=(node_of(process),)).stop()


def test_a_node_that_ends_at_once_is_named_with_its_log(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"], start_new_session=True)
    (tmp_path / "token").write_text("0")
    (tmp_path / "head.log").write_text("no port is free")
    cluster = LocalCluster(str(tmp_path), *free_ports(3), nodes=(node_of(process),), count=1)
    with pytest.raises(ServiceError, match=r"head did not come up .*no port is free"):
        cluster.wait()
    process.wait()


def test_down_where_nothing_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not down(tmp_path / "cluster.json")
    assert main(["down"]) == 0
    assert "no cluster is up" in capsys.readouterr().out


def test_a_file_that_is_none_of_a_cluster_is_named(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text('{"nodes": 3}')
    with pytest.raises(ConfigError, match=r"cluster\.json does not describe a cluster"):
        remembered(tmp_path / "cluster.json")


def test_a_token_is_its_owners_alone() -> None:
    cluster = LocalCluster.new()
    try:
        assert (Path(cluster.folder, "token").stat().st_mode & 0o777, Path(cluster.folder).stat().st_mode & 0o777) == (0o600, 0o700)
        assert len(Path(cluster.folder, "token").read_text()) == 64
    finally:
        cluster.stop()
    assert not Path(cluster.folder).exists()


def test_nothing_of_a_head_listens_beyond_loopback(running_head: RunningHead) -> None:
    own = {process.pid for process in running_head.cluster.nodes[0].processes()}
    sockets = [each for each in psutil.net_connections("inet") if each.pid in own and each.status == psutil.CONN_LISTEN]
    assert len(sockets) > 5
    assert {each.laddr.ip for each in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
