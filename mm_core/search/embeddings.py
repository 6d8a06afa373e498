"""A folder of vectors, and what is searched in it.

DIR/embeddings.json     of which samples, by which model
DIR/index/              the index of the shards, unless it was an index that was embedded
DIR/values/*.parquet    in the index's order: the picture's vector, its captions', float16; null where a sample could not be read
DIR/search/             what `mm search-index` made of it:
    search.json         how it is searched, with which recall
    images.npy, texts.npy       the vectors that there are, float16
    images.faiss, texts.faiss   what finds the nearest of them
    items.arrow         a row for each of images.npy: ordinal, uid, first caption, and what filters can name
    captions.arrow      a row for each of texts.npy: its item, and the caption
    map.arrow           some items on a plane
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from mm_core.address import is_local
from mm_core.config import Config
from mm_core.data.side_table import SMALL_CHUNK_ROWS, SideTable
from mm_core.errors import ConfigError, DataError

FORMAT = 1
_EMBEDDINGS, _SEARCH = "embeddings.json", "search.json"


class EmbeddingsSummary(Config):
    """embeddings.json."""

    format: int = FORMAT
    model: str = Field(description="Folder, hub id or models:/NAME/VERSION.")
    model_digest: str
    embed_dim: int
    index_url: str
    index_fingerprint: str
    kept_fingerprint: str = Field(description="Of the samples of it that were chosen.")
    rows: int = Field(description="Of the index, those that are not usable included.")
    chunk_rows: int = SMALL_CHUNK_ROWS
    unreadable: dict[str, int] = Field(default_factory=dict, description="Samples that could not be read, by reason.")
    samples: int = Field(default=0, description="That have vectors.")
    complete: bool = False

    @property
    def fingerprint(self) -> str:
        """Of what is embedded, and by what."""
        text = json.dumps([self.format, self.model_digest, self.kept_fingerprint, self.chunk_rows])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Recall(Config):
    """Of a search that leaves vectors out, beside one that compares all."""

    queries: int
    kind: Literal["texts", "images"] = Field(description="What was searched with.")
    at_10: float


class Searchable(Config):
    """One set of vectors."""

    vectors: int
    kind: Literal["exact", "ivf", "hnsw"]
    codes: Literal["fp16", "int8", "pq"]
    probes: int = Field(default=0, description="Of IVF the cells, of HNSW the candidates, that a query looks at.")
    reranked: int = Field(default=0, description="Results that are compared again by their exact vectors, for each that is asked for.")
    recall: tuple[Recall, ...] = ()
    bytes: int
    build_s: float


class SearchSummary(Config):
    """search.json."""

    format: int = FORMAT
    model: str
    model_digest: str
    embed_dim: int
    index_url: str
    index_fingerprint: str
    images: Searchable | None = None
    texts: Searchable | None = None


def vectors_folder(address: str) -> Path:
    """The folder that an argument names, from the root.

    Raises:
        ConfigError: it is a URL: what is searched is mapped from a disk.
    """
    if not is_local(address):
        raise ConfigError(f"{address}: vectors are mapped from a disk: give a folder, on a cluster one that every node sees")
    return Path(address.removeprefix("file://")).absolute()


def values_of(folder: Path, summary: EmbeddingsSummary) -> SideTable:
    return SideTable(str(folder / "values"), summary.rows, summary.chunk_rows)


def read_embeddings_summary(folder: str | Path) -> EmbeddingsSummary | None:
    """None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    return _read(Path(folder) / _EMBEDDINGS, EmbeddingsSummary)


def write_embeddings_summary(folder: Path, summary: EmbeddingsSummary) -> None:
    _write(folder / _EMBEDDINGS, summary)


def read_search_summary(folder: str | Path) -> SearchSummary:
    """
    Raises:
        DataError: there is none, or it cannot be read.
    """
    summary = _read(search_folder(folder) / _SEARCH, SearchSummary)
    if summary is None:
        raise DataError(f"no search index in {folder}: make one with `mm embed MODEL SHARDS --out {folder}` and `mm search-index {folder}`")
    return summary


def write_search_summary(folder: Path, summary: SearchSummary) -> None:
    """`folder`: of the search index itself."""
    _write(folder / _SEARCH, summary)


def search_folder(folder: str | Path) -> Path:
    return Path(folder) / "search"


S = TypeVar("S", EmbeddingsSummary, SearchSummary)


def _read(path: Path, kind: type[S]) -> S | None:
    try:
        summary = kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    if summary.format != FORMAT:
        raise DataError(f"{path} has format {summary.format}, this mm reads {FORMAT}: make it again")
    return summary


def _write(path: Path, summary: Config) -> None:
    from mm_core.store import write_whole

    write_whole(str(path), summary.model_dump_json(indent=1).encode())
