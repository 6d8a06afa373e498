"""Uids as numbers of 128 bits, so that a hundred million of them are sorted and looked up without Python touching one.

32 hexadecimal digits are their value, as in DataComp's subset files; any other uid is hashed to 128 bits. A number is held as 16 bytes,
highest first, whose order is that of the numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mm_core.data.permutation import mix
from mm_core.errors import DataError
from mm_core.store import open_file, reaching

SUBSET = np.dtype("u8,u8")
"""Of DataComp's subset files: the high and the low half of each uid, sorted."""
Keys = NDArray[np.bytes_]
_KEY = np.dtype("S16")
_DIGITS = 32
_NO_DIGIT = 0xFF
_HIGH, _LOW = 8, 9
"""Keep the halves of a hash apart from each other, and from the keys of the plan, the reader, the mix and the kept set."""
_WORD = np.dtype("<u8")
_ROWS = 1 << 18
_MAX_BYTES = 4096
"""Of a uid that are told apart; its length counts too."""


def uid_keys(uids: pa.Array | pa.ChunkedArray) -> tuple[Keys, NDArray[np.bool_]]:
    """The number of each uid, and whether it is the value of 32 hexadecimal digits. A null has that of the empty string."""
    texts = pa.chunked_array([uids]) if isinstance(uids, pa.Array) else uids
    texts = pc.fill_null(texts.cast(pa.large_string()), "").combine_chunks()
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int64)[texts.offset :][: len(texts) + 1] if len(texts) else np.zeros(1, np.int64)
    data = np.frombuffer(texts.buffers()[2] or b"", dtype=np.uint8)
    lengths = np.diff(offsets)
    keys, exact = np.zeros((len(texts), 16), dtype=np.uint8), lengths == _DIGITS
    nibbles = _nibbles()[data[offsets[:-1][exact, None] + np.arange(_DIGITS)]]
    digits = (nibbles != _NO_DIGIT).all(axis=1)
    exact[exact] = digits
    keys[exact] = (nibbles[digits, ::2] << 4) | nibbles[digits, 1::2]
    if not exact.all():
        keys[~exact] = _hashed(data, offsets[:-1][~exact], lengths[~exact])
    return keys.view(_KEY).reshape(-1), exact


def subset_array(keys: Keys) -> NDArray[np.void]:
    """Sorted as a DataComp subset file holds them."""
    halves = np.sort(keys).view(">u8").astype("<u8")
    return halves.view(SUBSET).reshape(-1)


@dataclass(frozen=True)
class UidList:
    """The uids that a file lists."""

    keys: Keys
    """Sorted, each once."""
    times: NDArray[np.int64]
    """How often each is listed."""

    @classmethod
    def of(cls, keys: Keys) -> UidList:
        return cls(*np.unique(keys, return_counts=True))

    @classmethod
    def read(cls, url: str) -> UidList:
        """From a DataComp subset file (`.npy`), a Parquet table with a column `uid`, or a text with a uid a line.

        Raises:
            DataError: it cannot be read, is none of these, or is empty.
        """
        try:
            with reaching(url), open_file(url, "rb") as file:
                start = file.read(6)
            with reaching(url):
                blocks = list(_subset_blocks(url) if start == b"\x93NUMPY" else _text_blocks(url, parquet=start[:4] == b"PAR1"))
        except (OSError, ValueError) as error:  # Arrow's errors of a format are ValueErrors
            raise DataError(f"cannot read uids from {url}: {' '.join(str(error).split())}") from None
        if not sum(map(len, blocks)):
            raise DataError(f"{url} lists no uid")
        return cls.of(np.concatenate(blocks))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.keys.data, digest_size=16)
        digest.update(self.times.astype("<i8").data)
        return digest.hexdigest()

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """For each of some keys its place in the list, -1 where it is not listed."""
        order = np.argsort(keys)  # neighbours are looked up together: three times as fast
        places = np.empty(len(keys), dtype=np.int64)
        places[order] = np.searchsorted(self.keys, keys[order])
        inside = np.minimum(places, len(self.keys) - 1)
        return np.where(self.keys[inside] == keys, inside, -1)


def _subset_blocks(url: str) -> Iterator[Keys]:
    with open_file(url, "rb") as file:
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    if array.ndim != 1 or array.dtype != SUBSET:
        raise ValueError(f"it holds {array.dtype} of shape {array.shape}, a subset file one column of pairs of 64-bit numbers ({SUBSET})")
    for first in range(0, len(array), _ROWS):
        yield np.ascontiguousarray(array[first : first + _ROWS]).view("<u8").astype(">u8").view(_KEY)


def _text_blocks(url: str, *, parquet: bool) -> Iterator[Keys]:
    with open_file(url, "rb") as file:
        if parquet:
            table = pq.ParquetFile(file)
            if "uid" not in table.schema_arrow.names:
                raise ValueError(f"it has no column `uid`, but {', '.join(table.schema_arrow.names)}")
            batches = table.iter_batches(batch_size=_ROWS, columns=["uid"])
        else:
            batches = pacsv.open_csv(
                file,
                read_options=pacsv.ReadOptions(column_names=["uid"]),
                parse_options=pacsv.ParseOptions(delimiter="\x1f", quote_char=False),
                convert_options=pacsv.ConvertOptions(column_types={"uid": pa.string()}),
            )
        for batch in batches:
            yield uid_keys(pc.utf8_trim_whitespace(batch["uid"].cast(pa.large_string()).drop_null()))[0]


def _hashed(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """128 bits of each text, as bytes."""
    high, low = mix(_HIGH, lengths.astype(np.uint64)), mix(_LOW, lengths.astype(np.uint64))
    for first in range(0, min(_MAX_BYTES, int(lengths.max())), _WORD.itemsize):
        rows = np.flatnonzero(lengths > first)  # a text's number must not depend on how long the others are
        places = first + np.arange(_WORD.itemsize)
        there = places < lengths[rows, None]
        letters = np.where(there, data[np.where(there, starts[rows, None] + places, 0)], 0).astype(np.uint8)
        word = letters.view(_WORD).reshape(-1)
        high[rows], low[rows] = mix(high[rows], word), mix(low[rows], word)
    return np.stack([high, low], axis=1).astype(">u8").view(np.uint8)


def _nibbles() -> NDArray[np.uint8]:
    """What a character is worth as a hexadecimal digit."""
    table = np.full(256, _NO_DIGIT, dtype=np.uint8)
    for value, digit in enumerate("0123456789abcdef"):
        table[[ord(digit), ord(digit.upper())]] = value
    return table
