"""Reading byte ranges of shards, from a local disk or any fsspec store, with retries that reopen.

Ranges of one shard that lie close are fetched in one request. What comes back has the length that was asked for, or is an error.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import fsspec

from mm_core.address import is_local
from mm_core.data.problems import Reason, SampleProblem

logger = logging.getLogger(__name__)
T = TypeVar("T")

_OPEN_FILES = 64
_BACKOFF_S = (0.1, 0.4, 1.6)
_MAX_REQUEST_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Span:
    url: str
    start: int
    size: int


class RangedReader:
    """Keeps local files open between reads. One per process; not for use by several threads."""

    def __init__(self, *, gap_bytes: int = 256 << 10) -> None:
        self._gap_bytes = gap_bytes
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, spans: Sequence[Span]) -> list[bytes | SampleProblem]:
        """The bytes of each span, in the order asked; READ_FAILED in the place of one that no retry could read."""
        results: list[bytes | SampleProblem] = [SampleProblem(Reason.READ_FAILED)] * len(spans)
        for request in self._requests(spans):
            first, last = spans[request[0]], spans[request[-1]]
            start, end = first.start, max(last.start + last.size, first.start + first.size)
            try:
                data = retried(partial(self._fetch, first.url, start, end), partial(self.forget, first.url))
            except OSError as error:
                for i in request:
                    results[i] = SampleProblem(Reason.READ_FAILED, f"{first.url} bytes {start}-{end}: {error}")
                continue
            for i in request:
                offset = spans[i].start - start
                results[i] = data[offset : offset + spans[i].size]
        return results

    def forget(self, url: str) -> None:
        """Close the file, so that the next read opens it anew."""
        descriptor = self._files.pop(url, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        for url in list(self._files):
            self.forget(url)

    def _requests(self, spans: Sequence[Span]) -> list[list[int]]:
        """Indexes of `spans`, gathered into requests. Local reads are not merged: a seek costs nothing there."""
        order = sorted(range(len(spans)), key=lambda i: (spans[i].url, spans[i].start))
        requests: list[list[int]] = []
        end = 0
        for i in order:
            span = spans[i]
            if requests and not is_local(span.url):
                first = spans[requests[-1][0]]
                size = span.start + span.size - first.start
                if first.url == span.url and span.start - end <= self._gap_bytes and size <= _MAX_REQUEST_BYTES:
                    requests[-1].append(i)
                    end = max(end, span.start + span.size)
                    continue
            requests.append([i])
            end = span.start + span.size
        return requests

    def _fetch(self, url: str, start: int, end: int) -> bytes:
        if is_local(url):
            data = os.pread(self._descriptor(url), end - start, start)
        else:
            fs, path = fsspec.core.url_to_fs(url)
            data = fs.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"got {len(data)} of {end - start} bytes")
        return data

    def _descriptor(self, url: str) -> int:
        if url not in self._files:
            if len(self._files) >= _OPEN_FILES:
                self.forget(next(iter(self._files)))
            self._files[url] = os.open(url.removeprefix("file://"), os.O_RDONLY)
        self._files.move_to_end(url)
        return self._files[url]


def retried(read: Callable[[], T], reopen: Callable[[], None]) -> T:
    """Call `read`; after an OSError reopen, wait, and call it again, four times in all."""
    for wait_s in _BACKOFF_S:
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise  # waiting mends neither
        except OSError as error:
            logger.warning("read failed, trying again in %.1f s: %s", wait_s, error)
            reopen()
            time.sleep(wait_s)
    return read()
