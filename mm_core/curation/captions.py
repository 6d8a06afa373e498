"""The captions of some rows, with what several rules measure of them worked out once.

Everything is vectorised: a caption's characters are looked at as one long array of code points of all captions, so that a rule costs
some hundred nanoseconds a sample.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, UInt8, UInt32, UInt64
from numpy.typing import NDArray

UNICODE = f"Unicode {unicodedata.unidata_version}"
"""Whose letters, white space and lower case this Python knows."""
_ALPHANUMERIC, _SPACE, _JOINED = 1, 2, 4
_CLASS_SHIFT, _LETTER = np.uint32(24), np.uint32((1 << 24) - 1)
_POWER = np.uint64(0x9E3779B97F4A7C15)
_HASH_BITS = 40
"""The rest of 64 number the captions of a batch."""

_WITHOUT_SPACES = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Burmese, Khmer
    *((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),  # Japanese, Chinese
)
"""Scripts, first and last code point, that put no spaces between words."""


class Tokens(NamedTuple):
    """What terms are looked for in."""

    hashes: UInt64[np.ndarray, " tokens"]
    owners: Int[np.ndarray, " tokens"]
    """The caption of each, ascending."""


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
    def _known(self) -> UInt32[np.ndarray, " characters"]:
        return _table().take(self.characters)

    @cached_property
    def _classes(self) -> UInt8[np.ndarray, " characters"]:
        return (self._known >> _CLASS_SHIFT).astype(np.uint8)

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
    def tokens(self) -> Tokens:
        """Words, but with every other character than letters, digits and their marks for itself: `it's` is three. So is every letter of
        a script that puts no spaces between words: a term is then found wherever it is written."""
        joined = (self._classes & _JOINED) > 0
        starts = (self._classes & _SPACE) == 0
        inside = joined[1:] & joined[:-1]
        inside[self.starts[(self.starts > 0) & (self.lengths > 0)] - 1] = False
        starts[1:] &= ~inside
        begins = np.flatnonzero(starts)
        counts = np.diff(np.searchsorted(begins, self.starts), append=len(begins))
        return Tokens(self.hashes(begins), np.repeat(np.arange(len(self)), counts))

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

        Words are compared by their hashes.
        """
        begins = np.flatnonzero(self.word_starts)
        if not len(begins):
            return np.zeros(len(self))
        hashes = self.hashes(begins)
        owners = np.repeat(np.arange(len(self), dtype=np.uint64), self.words)
        both = np.sort(owners << np.uint64(_HASH_BITS) | hashes >> np.uint64(64 - _HASH_BITS))
        owner, again = both >> np.uint64(_HASH_BITS), np.append(False, both[1:] == both[:-1])
        repeats = np.bincount(owner.astype(np.int64), weights=again, minlength=len(self))
        return np.asarray(repeats / np.maximum(self.words, 1))

    def hashes(self, begins: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        """Of what is written from each of `begins` up to the next, whatever its case, white space left out: a polynomial of the letters
        modulo 2^64."""
        if not len(begins):
            return np.zeros(0, dtype=np.uint64)
        letters = self._known & _LETTER
        powers, inverses = _powers(len(letters))
        return np.add.reduceat(letters * powers[: len(letters)], begins) * inverses.take(begins) * _POWER

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


@lru_cache(maxsize=1)
def _character_classes() -> UInt8[np.ndarray, " codepoints"]:
    """What `str.isalnum` and `str.isspace` say of every code point, and whether it makes one word with such a one beside it."""
    every = [chr(code) for code in range(sys.maxunicode + 1)]
    alphanumeric = np.fromiter(map(str.isalnum, every), dtype=np.uint8, count=len(every))
    space = np.fromiter(map(str.isspace, every), dtype=np.uint8, count=len(every))
    marks = np.fromiter((unicodedata.category(char)[0] == "M" for char in every), dtype=np.uint8, count=len(every))
    joined = alphanumeric | marks
    for first, last in _WITHOUT_SPACES:
        joined[first : last + 1] = 0
    return alphanumeric * np.uint8(_ALPHANUMERIC) | space * np.uint8(_SPACE) | joined * np.uint8(_JOINED)


@lru_cache(maxsize=1)
def _lower_case() -> NDArray[np.uint32]:
    """Every code point's lower case, where that is one code point; 0 for white space."""
    lower = (char.lower()[0] for char in map(chr, range(sys.maxunicode + 1)))
    codes = np.fromiter(map(ord, lower), dtype=np.uint32, count=sys.maxunicode + 1)
    codes[(_character_classes() & _SPACE) > 0] = 0
    return codes


@lru_cache(maxsize=1)
def _table() -> NDArray[np.uint32]:
    """Of every code point both: one look-up costs a nanosecond a character."""
    return _lower_case() | _character_classes().astype(np.uint32) << _CLASS_SHIFT


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
