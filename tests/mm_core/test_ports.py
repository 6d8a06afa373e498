"""Ports that nobody has, and that the system gives to nobody meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mm_core import ports
from mm_core.ports import LOOPBACK, free_ports


def test_each_is_another_and_free() -> None:
    found = free_ports(50)
    assert len(set(found)) == 50
    for port in found:
        with socket.socket() as one:
            one.bind((LOOPBACK, port))


def test_one_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(free_ports(2))
    monkeypatch.setattr(ports, "_OURS", range(first, second + 1, second - first))
    with socket.socket() as taken:
        taken.bind((LOOPBACK, first))
        taken.listen()
        assert free_ports(1) == [second]


def test_the_system_gives_none_of_them_away() -> None:
    own = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not own.exists():
        pytest.skip("no Linux")
    first, last = map(int, own.read_text().split())
    if (first, last) != (32768, 60999):
        pytest.skip(f"this machine hands out {first} to {last}")
    assert not set(free_ports(50)) & set(range(first, last + 1))
