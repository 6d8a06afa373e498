"""Ports of loopback that nobody listens on.

Not such as the system hands out by itself (`bind` to 0, outgoing connections): until the caller listens, one of them may be given away.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

LOOPBACK = "127.0.0.1"
_OURS = range(20_000, 32_768)
"""Below those that Linux hands out (from 32768, unless `net.ipv4.ip_local_port_range` says otherwise), and above those of Ray."""


def free_ports(count: int) -> list[int]:
    """So many, each another, at random, so that two who ask at the same time get different ones."""
    with ExitStack() as stack:
        found: list[int] = []
        for port in random.sample(_OURS, len(_OURS)):
            if len(found) == count:
                break
            each = stack.enter_context(socket.socket())
            with suppress(OSError):
                each.bind((LOOPBACK, port))
                found.append(port)
        return found


def free_port() -> int:
    return free_ports(1)[0]
