"""Where an endpoint can listen."""

from __future__ import annotations

import socket

from mm_core.errors import ServiceError


def check_address(host: str, port: int) -> None:
    """
    Raises:
        ServiceError: nothing can listen there.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = f"port {port} of {host} cannot be used ({error.strerror})"
        raise ServiceError(f"{reason}: stop what listens there, or give another --port or --host") from None
