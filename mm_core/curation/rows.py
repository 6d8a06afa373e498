"""Some rows of an index as columns, with what several rules measure of them worked out once.

Everything is vectorised: a caption's characters are looked at as one long array of code points of all captions, so that a rule costs
some hundred nanoseconds a sample.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray

from mm_core.data.sample import IMAGE_SUFFIXES

_ALPHANUMERIC, _SPACE = 1, 2
_POWER = np.uint64(0x9E3779B97F4A7C15)
_HASH_BITS = 40
"""The rest of 64 number the captions of a batch."""


class Captions:
    """All captions of some rows, one after another."""

    def __init__(self, lists: pa.ListArray) -> None:
        self.rows = len(lists)
        self.texts: pa.StringArray = pc.list_flatten(lists)
        self.owners: Int[np.ndarray, " captions"] = pc.list_parent_indices(lists).to_numpy()
        """The row of each caption, ascending."""

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " captions"]:
        """In characters."""
        return np.asarray(pc.utf8_length(self.texts).to_numpy(zero_copy_only=False), dtype=np.int64)

    @cached_property
    def starts(self) -> Int[np.ndarray, " captions"]:
        """Where each begins among `characters`."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def characters(self) -> NDArray[np.uint32]:
        """The code points of all captions."""
        offsets = np.frombuffer(self.texts.buffers()[1], dtype=np.int32)[self.texts.offset :][: len(self.texts) + 1]
        data = memoryview(self.texts.buffers()[2] or b"")[offsets[0] : offsets[-1]]
        order = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
        return np.frombuffer(str(data, "utf-8").encode(order), dtype=np.uint32)

    @cached_property
    def _classes(self) -> UInt8[np.ndarray, " characters"]:
        return _character_classes()[self.characters]

    @cached_property
    def alphanumeric(self) -> Float[np.ndarray, " captions"]:
        """The share of a caption's characters that are letters or digits of any script."""
        return self.total(self._classes & _ALPHANUMERIC) / np.maximum(self.lengths, 1)

    @cached_property
    def word_starts(self) -> Bool[np.ndarray, " characters"]:
        """Whether a word, a run of characters without white space, begins here."""
        space = (self._classes & _SPACE) > 0
        starts = ~space
        starts[1:] &= space[:-1]
        first = self.starts[self.lengths > 0]
        starts[first] = ~space[first]
        return starts

    @cached_property
    def words(self) -> Int[np.ndarray, " captions"]:
        """How many."""
        return self.total(self.word_starts)

    @cached_property
    def longest_run(self) -> Int[np.ndarray, " captions"]:
        """Of one character, white space aside."""
        if not len(self.characters):
            return np.zeros(len(self), dtype=np.int64)
        begins = np.empty(len(self.characters), dtype=bool)
        begins[0], begins[1:] = True, self.characters[1:] != self.characters[:-1]
        begins[self.starts[self.lengths > 0]] = True
        at = np.flatnonzero(begins)
        runs = np.diff(at, append=len(begins))
        runs[(self._classes[at] & _SPACE) > 0] = 0
        return self._reduced(np.maximum, runs, np.searchsorted(at, self.starts))

    @cached_property
    def repeated_words(self) -> Float[np.ndarray, " captions"]:
        """The share of a caption's words that it had before, whatever their case.

        Words are compared by a polynomial hash of their letters, of which prefix sums give every word's at once.
        """
        begins = np.flatnonzero(self.word_starts)
        if not len(begins):
            return np.zeros(len(self))
        powers, inverses = _powers(len(self.characters))
        sums = np.zeros(len(self.characters) + 1, dtype=np.uint64)
        letters = _lower_case()[self.characters]
        np.cumsum(letters * powers[: len(letters)], out=sums[1:])
        hashes = (sums[np.append(begins[1:], len(letters))] - sums[begins]) * inverses[begins] * _POWER
        owners = np.repeat(np.arange(len(self), dtype=np.uint64), self.words)
        both = np.sort(owners << np.uint64(_HASH_BITS) | hashes >> np.uint64(64 - _HASH_BITS))
        owner, again = both >> np.uint64(_HASH_BITS), np.append(False, both[1:] == both[:-1])
        repeats = np.bincount(owner.astype(np.int64), weights=again, minlength=len(self))
        return np.asarray(repeats / np.maximum(self.words, 1))

    def total(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Per caption, the sum of its characters' values."""
        sums = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum(values, out=sums[1:])
        return sums[self.starts + self.lengths] - sums[self.starts]

    def _reduced(self, ufunc: np.ufunc, values: NDArray[np.int64], firsts: NDArray[np.int64]) -> NDArray[np.int64]:
        """`reduceat` that takes empty captions."""
        result = np.zeros(len(self), dtype=values.dtype)
        full = self.lengths > 0
        result[full] = ufunc.reduceat(values, firsts[full])
        return result


@dataclass(frozen=True)
class Rows:
    """Rows of an index, usable ones only, in its order."""

    table: pa.Table
    """Columns of the index that the rules name (`Rule.columns`)."""
    scores: Mapping[str, pa.Table]
    """By name, the columns of the scores the rules name; null where a sample could not be scored."""

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, column: str) -> Float[np.ndarray, " rows"]:
        """NaN where null."""
        return np.asarray(pc.cast(self.table[column], pa.float64()).to_numpy(), dtype=np.float64)

    @cached_property
    def captions(self) -> Captions:
        return Captions(self.table["captions"].combine_chunks())

    @cached_property
    def image_bytes(self) -> Float[np.ndarray, " rows"]:
        """Size of the encoded picture; NaN where there is none."""
        lists = self.table["members"].combine_chunks()
        members, owners = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
        pictures = np.flatnonzero(pc.is_in(pc.struct_field(members, "suffix"), pa.array(IMAGE_SUFFIXES)).to_numpy(zero_copy_only=False))
        rows, first = np.unique(owners[pictures], return_index=True)
        sizes = np.full(len(self), np.nan)
        sizes[rows] = pc.struct_field(members, "size").to_numpy()[pictures[first]]
        return sizes


@lru_cache(maxsize=1)
def _character_classes() -> UInt8[np.ndarray, " codepoints"]:
    """What `str.isalnum` and `str.isspace` say of every code point."""
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    alphanumeric = np.fromiter(map(str.isalnum, every), dtype=np.uint8, count=len(every))
    space = np.fromiter(map(str.isspace, every), dtype=np.uint8, count=len(every))
    return alphanumeric * np.uint8(_ALPHANUMERIC) | space * np.uint8(_SPACE)


@lru_cache(maxsize=1)
def _lower_case() -> NDArray[np.uint32]:
    """Every code point's lower case, where that is one code point; 0 for white space."""
    lower = (char.lower()[0] for char in map(chr, range(sys.maxunicode + 1)))
    codes = np.fromiter(map(ord, lower), dtype=np.uint32, count=sys.maxunicode + 1)
    codes[(_character_classes() & _SPACE) > 0] = 0
    return codes


_known_powers = (np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64))


def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """At least `count` powers of an odd number modulo 2^64, and their inverses."""
    global _known_powers
    if len(_known_powers[0]) < count:
        inverse = np.uint64(pow(int(_POWER), -1, 1 << 64))
        powers, inverses = (np.full(2 * count, factor) for factor in (_POWER, inverse))
        powers[0] = inverses[0] = 1
        _known_powers = (np.cumprod(powers, dtype=np.uint64), np.cumprod(inverses, dtype=np.uint64))
    return _known_powers
