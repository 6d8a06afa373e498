"""Addresses of files: local paths and fsspec URLs."""

from __future__ import annotations

import os
import re

_USER = r"""(://[^/\s:@\[]*:)"""
_PORT = r"""(?:\d+|\$\{?\w+\}?)(?:[/?#,\s'"]|$)"""
_PASSWORD = re.compile(
    # It may hold `/` and `@` itself, as SQLAlchemy takes it: all up to a URL's last `@`, unless it begins as a port does.
    rf"""{_USER}(?!{_PORT})(?:(?!://)[^\s'"])+(?=@)"""
    rf"""|{_USER}[^/\s@]+(?=@)"""
    r"""|([?&](?:password|passwd|pwd|token|sig|x-amz-signature|x-amz-security-token)=)[^&#\s'"]+""",
    re.IGNORECASE,
)


def absolute(address: str) -> str:
    """A URL as it is, a local path from the root: what is sent to another process must not depend on its working folder."""
    return address if "://" in address else os.path.abspath(address)


def is_local(address: str) -> bool:
    return "://" not in address or address.startswith("file://")


def without_password(text: str) -> str:
    """`text` with the password of every URL in it replaced by stars, before the host and among the options behind `?`."""
    return _PASSWORD.sub(r"\1\2\3***", text)
