"""The deployment that holds a search index: mapped from disk, so that copies on one machine share its memory. Pictures are read from the
shards they lie in."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from mm_core.data.image import decode_whole
from mm_core.data.index import Index
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.errors import ConfigError
from mm_core.search.filters import Condition
from mm_core.search.index import SearchIndex
from serve.hits import Hits, Refused, Vector

_THREADS = 4
_KEPT_PICTURES = 512


class Searcher:
    """One copy."""

    def __init__(self, folder: str, max_pixels: int) -> None:
        """
        Raises:
            DataError: there is no search index, or it is damaged.
        """
        self._index = SearchIndex.open(folder)
        self._max_pixels = max_pixels
        self._pictures = IndexReader(Index.open(self._index.summary.index_url))
        self._reading = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="search")
        self._thumbnails = lru_cache(_KEPT_PICTURES)(self._thumbnail)

    async def search(
        self, query: Vector, target: Literal["images", "texts"], filters: Sequence[Condition], offset: int, limit: int
    ) -> Hits | Refused:
        """The page of the nearest that begins at `offset`."""

        def find() -> Hits | Refused:
            try:
                found = self._index.search(query, offset + limit + 1, target=target, filters=filters)
            except ConfigError as error:
                return Refused(f"filters: {error}")
            return Hits(self._index.hits(target, *(part[offset : offset + limit] for part in found)), len(found[0]) > offset + limit)

        return await self._off(find)

    async def vector(self, item: int) -> Vector | Refused:
        return await self._off(lambda: self._index.vector(item) if item < len(self._index) else self._absent(item))

    async def thumbnail(self, item: int, side: int) -> bytes | Refused:
        """A JPEG."""

        def read() -> bytes | Refused:
            if not 0 <= item < len(self._index):
                return self._absent(item)
            try:
                return self._thumbnails(item, side)
            except SampleProblem as problem:
                return Refused(f"item {item}: {problem}")

        return await self._off(read)

    async def about(self) -> dict[str, Any]:
        return self._index.about()

    async def map(self) -> dict[str, Any]:
        return await self._off(self._index.map)

    def _thumbnail(self, item: int, side: int) -> bytes:
        ordinal = self._index.ordinal(item)
        with self._reading:  # a reader is not for use by several threads
            (sample,) = self._pictures.read(np.array([ordinal], dtype=np.uint64))
        if isinstance(sample, SampleProblem):
            raise sample
        buffer = io.BytesIO()
        Image.fromarray(decode_whole(sample.image or b"", side, max_pixels=self._max_pixels)).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def _absent(self, item: int) -> Refused:
        return Refused(f"item: there are {len(self._index):,} items, {item} is none of them")

    async def _off(self, work: Any) -> Any:
        """Off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
