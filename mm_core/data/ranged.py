"""Reading byte ranges of shards, from a local disk or any fsspec store, with retries that reopen.

Ranges of one shard that lie close are fetched in one request, and the requests of one call run beside one another, so that a store's
latency is waited for once, not once a sample. What comes back has the length that was asked for, or is an error.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mm_core.address import is_local
from mm_core.data.problems import Reason, SampleProblem
from mm_core.store import CONNECTIONS, open_store

logger = logging.getLogger(__name__)
T = TypeVar("T")

GAP_BYTES = 256 << 10
"""Bytes between two samples that are read along rather than asked for apart."""
_OPEN_FILES = 64
_BACKOFF_S = (0.1, 0.4, 1.6)
_MAX_REQUEST_BYTES = 16 << 20
_FINAL = (FileNotFoundError, PermissionError)
"""Waiting mends neither."""


@dataclass(frozen=True, slots=True)
class Span:
    url: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Request:
    """One range to fetch, and which of the spans asked for lie in it."""

    span: Span
    members: list[int]


def gather(spans: Sequence[Span], gap_bytes: int = GAP_BYTES) -> list[Request]:
    """The requests that fetch `spans`: what lies up to `gap_bytes` apart in one shard is fetched together, up to 16 MB at a time.

    Local reads are not merged: a seek costs nothing there.
    """
    requests: list[Request] = []
    for i in sorted(range(len(spans)), key=lambda i: (spans[i].url, spans[i].start)):
        span = spans[i]
        if requests and not is_local(span.url):
            last = requests[-1]
            end = max(last.span.end, span.end)
            near = last.span.url == span.url and span.start - last.span.end <= gap_bytes
            if near and end - last.span.start <= _MAX_REQUEST_BYTES:
                last.members.append(i)
                requests[-1] = Request(Span(span.url, last.span.start, end - last.span.start), last.members)
                continue
        requests.append(Request(span, [i]))
    return requests


class RangedReader:
    """Keeps local files open between reads. One per process; not for use by several threads."""

    def __init__(self, *, gap_bytes: int = GAP_BYTES) -> None:
        self._gap_bytes = gap_bytes
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, spans: Sequence[Span]) -> list[bytes | SampleProblem]:
        """The bytes of each span, in the order asked; READ_FAILED in the place of one that no retry could read."""
        results: list[bytes | SampleProblem] = [SampleProblem(Reason.READ_FAILED)] * len(spans)
        requests = gather(spans, self._gap_bytes)
        for request, data in zip(requests, self._fetch([request.span for request in requests]), strict=True):
            for i in request.members:
                offset = spans[i].start - request.span.start
                results[i] = data if isinstance(data, SampleProblem) else data[offset : offset + spans[i].size]
        return results

    def forget(self, url: str) -> None:
        """Close the file, so that the next read opens it anew."""
        descriptor = self._files.pop(url, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        for url in list(self._files):
            self.forget(url)

    def _fetch(self, spans: Sequence[Span]) -> list[bytes | SampleProblem]:
        """Each range. Those that fail are, all together, waited for, reopened and fetched again, four times in all."""
        found = self._attempt(spans)
        for wait_s in _BACKOFF_S:
            failed = [i for i, data in enumerate(found) if isinstance(data, Exception) and not isinstance(data, _FINAL)]
            if not failed:
                break
            logger.warning("%d of %d reads failed, trying again in %.1f s: %s", len(failed), len(spans), wait_s, found[failed[0]])
            for i in failed:
                self.forget(spans[i].url)
            time.sleep(wait_s)
            for i, data in zip(failed, self._attempt([spans[i] for i in failed]), strict=True):
                found[i] = data
        return [
            SampleProblem(Reason.READ_FAILED, f"{span.url} bytes {span.start}-{span.end}: {data}") if isinstance(data, Exception) else data
            for span, data in zip(spans, found, strict=True)
        ]

    def _attempt(self, spans: Sequence[Span]) -> list[bytes | Exception]:
        """Each range, or why it could not be read this time."""
        found: list[bytes | Exception] = [OSError("not read")] * len(spans)
        remote: defaultdict[Any, list[tuple[int, str]]] = defaultdict(list)
        for i, span in enumerate(spans):
            if is_local(span.url):
                found[i] = self._read_local(span)
            else:
                fs, path = open_store(span.url)
                remote[fs].append((i, path))
        for fs, chosen in remote.items():
            asked = [spans[i] for i, _ in chosen]
            for (i, _), data in zip(chosen, _cat(fs, [path for _, path in chosen], asked), strict=True):
                found[i] = data
        return [
            OSError(f"got {len(data)} of {span.size} bytes") if isinstance(data, bytes) and len(data) != span.size else data
            for span, data in zip(spans, found, strict=True)
        ]

    def _read_local(self, span: Span) -> bytes | Exception:
        try:
            return _read_whole(self._descriptor(span.url), span)
        except OSError as error:
            return error

    def _descriptor(self, url: str) -> int:
        if url not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self.forget(next(iter(self._files)))
            self._files[url] = os.open(url.removeprefix("file://"), os.O_RDONLY)
        self._files.move_to_end(url)
        return self._files[url]


def _cat(fs: Any, paths: list[str], spans: Sequence[Span]) -> list[bytes | Exception]:
    """What the store answers to each range: bytes, or whatever error its library has, which is retried and in the end counted.

    Where the library is asynchronous, up to 32 requests are under way at a time.
    """
    bound = {"batch_size": CONNECTIONS} if fs.async_impl else {}
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    try:
        return list(fs.cat_ranges(paths, starts, ends, on_error="return", **bound))
    except OSError as error:  # of all of them: no connection, no credentials
        return [error] * len(spans)


def retried(read: Callable[[], T], reopen: Callable[[], None]) -> T:
    """Call `read`; after an OSError reopen, wait, and call it again, four times in all."""
    for wait_s in _BACKOFF_S:
        try:
            return read()
        except _FINAL:
            raise
        except OSError as error:
            logger.warning("read failed, trying again in %.1f s: %s", wait_s, error)
            reopen()
            time.sleep(wait_s)
    return read()


def _read_whole(descriptor: int, span: Span) -> bytes:
    """One read gives 2 GB at most."""
    data = os.pread(descriptor, span.size, span.start)
    while len(data) < span.size and (more := os.pread(descriptor, span.size - len(data), span.start + len(data))):
        data += more
    return data
