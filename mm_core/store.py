"""Stores that hold shards, indexes and runs: a local disk or any fsspec URL, opened in one way everywhere.

How a store is reached (endpoint, credentials, region) is its library's own configuration (`AWS_*`) and fsspec's (`FSSPEC_S3_…`). What is
set here are defaults that both can override: connections for concurrent reads, and no listings kept, as other processes write too.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import fsspec

from mm_core.address import is_local

CONNECTIONS = 32
"""Requests of one process under way at a time. botocore's own default of 10 gives 100 requests/s at 100 ms each."""
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure", "requests")


def open_store(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path there."""
    fs, path = fsspec.core.url_to_fs(url, **store_options(url))
    return fs, path


def open_file(url: str, mode: str) -> Any:
    """`fsspec.open`, with folders made for a file that is written where the store has folders."""
    return fsspec.open(url, mode, auto_mkdir=_protocol(url) not in OBJECT_STORES, **store_options(url))


def write_whole(url: str, data: bytes) -> None:
    """Write a file whole or not at all: a reader, or who comes after a kill, finds the old content or the new."""
    fs, path = open_store(url)
    if _protocol(url) in OBJECT_STORES:
        fs.pipe_file(path, data)
        return
    make_folder(url.rpartition("/")[0])
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        fs.pipe_file(temporary, data)
        fs.mv(temporary, path)
    except BaseException:
        with suppress(OSError):
            fs.rm(temporary)
        raise


@contextmanager
def writing_whole(url: str, scratch: str) -> Iterator[BinaryIO]:
    """A file of any size that is at `url` whole once the block has ended, and not at all if an error or a kill ends it.

    Args:
        scratch: a folder of the same store, where it lies until then; for an object store that is this machine's temporary folder.
    """
    fs, path = open_store(url)
    if _protocol(url) in OBJECT_STORES:
        with tempfile.NamedTemporaryFile() as local:
            yield local  # type: ignore[misc]
            local.flush()
            fs.put_file(local.name, path)
        return
    make_folder(scratch)
    make_folder(url.rpartition("/")[0])
    temporary = f"{open_store(scratch)[1]}/{uuid.uuid4().hex[:8]}.tmp"
    try:
        with fs.open(temporary, "wb") as file:
            yield file
        fs.mv(temporary, path)
    except BaseException:
        with suppress(OSError):
            fs.rm(temporary)
        raise


def make_folder(url: str) -> None:
    """A folder and those above it. In an object store it comes with its first object: s3fs would make a *bucket* of a mistyped name."""
    if _protocol(url) not in OBJECT_STORES:
        fs, path = open_store(url)
        fs.makedirs(path, exist_ok=True)


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What a store's library raises, as an OSError of one line: their own are of many kinds, some of many lines.

    Raises:
        OSError: FileNotFoundError and PermissionError stay what they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) or not of_store(error):
            raise
        what = " ".join(str(error).split()) or type(error).__name__
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(f"{what}{_way_out(url, error)}") from None


def _way_out(url: str, error: Exception) -> str:
    if _protocol(url) not in ("s3", "s3a") or not (isinstance(error, PermissionError) or "Credentials" in type(error).__name__):
        return ""
    return " (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, where mm and its workers run)"


def of_store(error: Exception) -> bool:
    """Whether a store raised `error`, and no mistake of this program."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES


def _protocol(url: str) -> str:
    return "file" if is_local(url) else url.partition("://")[0]


def store_options(url: str) -> dict[str, Any]:
    if _protocol(url) not in ("s3", "s3a"):
        return {}
    configured = fsspec.config.conf.get("s3", {})
    pool = {"max_pool_connections": CONNECTIONS} | configured.get("config_kwargs", {})
    return {"use_listings_cache": configured.get("use_listings_cache", False), "config_kwargs": pool}
