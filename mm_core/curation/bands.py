"""Hashes of 64 bits that differ in few, found by banded joins and not by comparing all with all.

Cut a hash into c bands: of two hashes that differ in k bits at most, one band differs in k // c bits at most. So for each band a
hash is looked up under its band's value and every value near that one, and compared with what is there, bit by bit. What is found is
what comparing all pairs finds, whatever c is; c only decides how long it takes. (Manku, Jain and Das Sarma 2007; Norouzi, Punjani and
Fleet 2012.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

BITS = 64
_VALUE, _LOOK_UP = 20_000, 200
"""What a value of a band costs, and each look-up of one near it, in comparisons of two hashes, which take 2 ns."""
_BLOCK_PAIRS, _BLOCK_VALUES = 1 << 15, 1 << 10
_LEAST_LIMIT = 1 << 14
_MOST_PART_BITS = 8
_WIDE = 64
"""How many times the average a bucket holds before it is cut."""
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Bands:
    """A way of cutting hashes. Band b has every c-th bit from b on, so that none has only the coarse frequencies of a picture, which are
    alike in more pictures."""

    distance: int
    """Bits that may differ."""
    count: int
    limit: int = _LEAST_LIMIT
    """Hashes in a bucket that one hash is compared with: of more, those next to it in order. Bounds what a value costs that is very
    frequent; what was cut is counted."""

    @classmethod
    def fitted(cls, distance: int, hashes: int) -> Bands:
        """The count that costs least for so many hashes."""

        def cost(count: int) -> float:
            return sum(
                min(hashes, 2**width) * (_VALUE + probes * _LOOK_UP) + hashes * probes * hashes / 2**width
                for width in _widths(count)
                for probes in [_probes(width, distance // count)]
            )

        count = min(range(1, distance + 2), key=cost)
        return cls(distance, count, max(_LEAST_LIMIT, _WIDE * (hashes >> min(_widths(count)))))

    @property
    def radius(self) -> int:
        """Bits by which the looked-up values of a band differ from its own."""
        return self.distance // self.count

    def parts(self, hashes: int, *, of: int) -> int:
        """Into how many ranges of values a band is divided, so that each has about `of` hashes: a power of two."""
        most = min(_MOST_PART_BITS, min(_widths(self.count)))
        return 1 << min(most, max(0, (hashes // of).bit_length()))

    def part_of(self, hashes: U64, band: int, parts: int) -> U64:
        """In which range of the band's values each hash lies."""
        found = np.zeros(len(hashes), dtype=np.uint64)
        for bit in self._bits[band][: parts.bit_length() - 1]:
            found = found << np.uint64(1) | (hashes >> np.uint64(bit)) & np.uint64(1)
        return found

    def keys(self, hashes: U64, band: int) -> U64:
        """The hashes with the band's bits moved to the top: in their order those of one value are neighbours, and distances stay."""
        keys = np.zeros(len(hashes), dtype=np.uint64)
        for place, bit in enumerate(self._order(band)):
            keys |= ((hashes >> np.uint64(bit)) & np.uint64(1)) << np.uint64(BITS - 1 - place)
        return keys

    def pairs(self, queries: U64, entries: U64, band: int) -> Iterator[tuple[I64, I64, int]]:
        """Of keys: places in `queries` and in the sorted `entries`, some pairs at a time, and how many look-ups were cut.

        A pair that an earlier band finds is left to it, so over all bands every pair comes once.
        """
        masks, earlier = self._masks(band), [self._places(band, other) for other in range(band)]
        order = np.argsort(queries)
        ordered = queries[order]
        rest = np.uint64((1 << (BITS - _widths(self.count)[band])) - 1)
        values, starts = np.unique(ordered & ~rest, return_index=True)
        ends = np.r_[starts[1:], len(ordered)]
        for at in range(0, len(values), _BLOCK_VALUES):
            wanted = values[at : at + _BLOCK_VALUES, None] ^ masks
            lows, highs = np.searchsorted(entries, wanted), np.searchsorted(entries, wanted | rest, side="right")
            for low, high, start, end in zip(lows, highs, starts[at:], ends[at:], strict=False):
                some = ordered[start:end]
                for query, entry, cut in self._of_value(some, entries, low, high, masks):
                    found = self._found_first(some[query] ^ entries[entry], earlier)
                    yield order[start:end][query[found]], entry[found], cut

    def _of_value(self, queries: U64, entries: U64, low: I64, high: I64, masks: U64) -> Iterator[tuple[I64, I64, int]]:
        """Of queries with one value of a band: what is near them in the buckets from `low` to `high`, one for each mask."""
        cut = high - low > self.limit
        whole = [(a, b) for a, b in zip(low[~cut].tolist(), high[~cut].tolist(), strict=True) if a < b]
        if whole:
            places = np.concatenate([np.arange(a, b) for a, b in whole])
            for query, place in self._near(queries, entries[places]):
                yield query, places[place], 0
        for first, last, mask in zip(low[cut], high[cut], masks[cut], strict=True):
            middles = np.searchsorted(entries, queries ^ mask)
            for one, start in enumerate(np.clip(middles - self.limit // 2, first, last - self.limit).tolist()):
                found = [place for _, place in self._near(queries[one : one + 1], entries[start : start + self.limit])]
                place = start + np.concatenate([np.zeros(0, np.int64), *found])
                yield np.full(len(place), one), place, 1

    def _near(self, queries: U64, entries: U64) -> Iterator[tuple[I64, I64]]:
        """All with all, some at a time: as many as a processor's cache holds, where a comparison takes two nanoseconds and not ten."""
        columns = min(len(entries), _BLOCK_PAIRS)
        rows = max(1, _BLOCK_PAIRS // columns)
        for row in range(0, len(queries), rows):
            for column in range(0, len(entries), columns):
                differ = queries[row : row + rows, None] ^ entries[column : column + columns]
                found = np.flatnonzero(np.bitwise_count(differ) <= self.distance)
                if len(found):
                    query, entry = np.divmod(found, differ.shape[1])
                    yield row + query, column + entry

    def _found_first(self, differ: U64, earlier: list[np.uint64]) -> NDArray[np.bool_]:
        """Of pairs, by the bits in which their keys differ: whether none of the earlier bands, whose places those are, finds them."""
        first = np.ones(len(differ), dtype=bool)
        for places in earlier:
            first &= np.bitwise_count(differ & places) > self.radius
        return first

    def _masks(self, band: int) -> U64:
        """The bits in which looked-up values differ from a band's own."""
        places = range(_widths(self.count)[band])
        chosen = [bits for size in range(self.radius + 1) for bits in combinations(places, size)]
        return np.array([sum(1 << (BITS - 1 - place) for place in bits) for bits in chosen], dtype=np.uint64)

    def _order(self, band: int) -> list[int]:
        own = self._bits[band]
        return own + [bit for bit in range(BITS) if bit not in own]

    def _places(self, band: int, other: int) -> np.uint64:
        """Where in the keys of `band` the bits of another are."""
        order = self._order(band)
        return np.uint64(sum(1 << (BITS - 1 - order.index(bit)) for bit in self._bits[other]))

    @cached_property
    def _bits(self) -> list[list[int]]:
        return [list(range(band, BITS, self.count)) for band in range(self.count)]


def _widths(count: int) -> list[int]:
    return [len(range(band, BITS, count)) for band in range(count)]


def _probes(width: int, radius: int) -> int:
    return sum(comb(width, size) for size in range(radius + 1))
