"""A search index that is open: vectors to items with their metadata. Everything is mapped; processes of one machine share the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from mm_core.errors import ConfigError, DataError
from mm_core.search.embeddings import Searchable, SearchSummary, read_search_summary, search_folder
from mm_core.search.filters import Condition, rows_that_meet
from mm_core.search.hit import Hit
from mm_core.search.nearest import Nearest

Target = Literal["images", "texts"]
HIDDEN = ("ordinal", "uid", "caption")
"""Columns of items.arrow that are no metadata."""


@dataclass
class SearchIndex:
    """Open it with `open`."""

    summary: SearchSummary
    _items: pa.Table
    _captions: pa.Table
    _map: pa.Table
    _nearest: dict[str, Nearest]
    _images: NDArray[np.float16] | None

    @classmethod
    def open(cls, folder: str | Path) -> SearchIndex:
        """
        Args:
            folder: that `mm embed` and `mm search-index` made.

        Raises:
            DataError: it is not there, or damaged.
        """
        summary, place = read_search_summary(folder), search_folder(folder)
        nearest, vectors = {}, {}
        for name, about in _searchables(summary).items():
            try:
                vectors[name] = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {place / name}.npy: {error}; make it again with mm search-index") from None
            nearest[name] = Nearest.open(place / f"{name}.faiss", vectors[name], about)
        items, captions, plane = (_mapped(place / f"{name}.arrow") for name in ("items", "captions", "map"))
        return cls(summary, items, captions, plane, nearest, vectors.get("images"))

    def __len__(self) -> int:
        """Items."""
        return int(self._items.num_rows)

    def search(
        self, query: Float32[np.ndarray, " d"], count: int, *, target: Target = "images", filters: Sequence[Condition] = ()
    ) -> tuple[Int64[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
        """Rows of the target and their cosines, best first; fewer than `count` where there are no more.

        Raises:
            ConfigError: the target is not there, or a filter that makes no sense.
        """
        if target not in self._nearest:
            raise ConfigError(f"the index holds no {target}, only {', '.join(self._nearest)}")
        among = rows_that_meet(self._items, filters) if filters else None
        if among is not None and target == "texts":
            among = among[self._captions["item"].to_numpy()]
        scores, rows = self._nearest[target].search(query[None], count, among=among)
        there = rows[0] >= 0
        return rows[0][there], scores[0][there]

    def hits(self, target: Target, rows: Int64[np.ndarray, " k"], scores: Float32[np.ndarray, " k"]) -> list[Hit]:
        """What rows of the target are."""
        captions: list[str | None] | None = None
        items = rows
        if target == "texts":
            chosen = self._captions.take(rows)
            items, captions = chosen["item"].to_numpy(), chosen["caption"].to_pylist()
        return [
            Hit(
                item=int(item),
                uid=row["uid"],
                score=float(score),
                caption=captions[i] if captions else row["caption"],
                metadata={name: value for name, value in row.items() if name not in HIDDEN},
                has_picture=self._images is not None,
            )
            for i, (item, row, score) in enumerate(zip(items, self._items.take(items).to_pylist(), scores, strict=True))
        ]

    def vector(self, item: int) -> Float32[np.ndarray, " d"]:
        """Of an item's picture.

        Raises:
            ConfigError: there are no pictures.
        """
        if self._images is None:
            raise ConfigError("the index holds no images")
        vector: Float32[np.ndarray, " d"] = self._images[item].astype(np.float32)
        return vector / np.linalg.norm(vector)

    def ordinal(self, item: int) -> int:
        """Of the sample in the index of the shards."""
        return int(self._items["ordinal"][item].as_py())

    def about(self) -> dict[str, Any]:
        """What is searched, for people and programs."""
        fields = {field.name: str(field.type) for field in self._items.schema if field.name != "ordinal"}
        searchables = {name: about.model_dump() for name, about in _searchables(self.summary).items()}
        return {"model": self.summary.model, "items": len(self), "dimensions": self.summary.embed_dim, "fields": fields} | searchables

    def map(self) -> dict[str, Any]:
        """Items on a plane: `item`, `x`, `y` as columns, and their captions."""
        columns: dict[str, Any] = self._map.to_pydict()
        return columns | {"caption": self._items["caption"].take(self._map["item"]).to_pylist()}


def _searchables(summary: SearchSummary) -> dict[str, Searchable]:
    return {name: about for name in ("images", "texts") if (about := getattr(summary, name)) is not None}


def _mapped(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read {path}: {error}; make it again with mm search-index") from None
