"""Addresses of files: local paths and fsspec URLs."""

from __future__ import annotations

import os
import re

_IN_USER = r"""(://[^/\s:@'"]*:)(?!\d+(?:[/?#,\s'"]|$))(?:(?!://)[^\s'"])+(?=@)"""
"""What stands between a user and the last `@` of a URL: a password may hold `/` and `@` itself, as SQLAlchemy takes it. A port is none."""
_IN_QUERY = r"""([?&](?:password|passwd|pwd|token|sig|x-amz-signature|x-amz-security-token)=)[^&#\s'"]+"""
_PASSWORD = re.compile(f"{_IN_USER}|{_IN_QUERY}", re.IGNORECASE)


def absolute(address: str) -> str:
    """A URL as it is, a local path from the root: what is sent to another process must not depend on its working folder."""
    return address if "://" in address else os.path.abspath(address)


def is_local(address: str) -> bool:
    return "://" not in address or address.startswith("file://")


def without_password(text: str) -> str:
    """`text` with the password of every URL in it replaced by stars, before the host and among the options behind `?`."""
    return _PASSWORD.sub(r"\1\2***", text)
