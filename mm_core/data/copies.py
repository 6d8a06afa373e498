"""How often each kept sample comes in an epoch, where weights say so: as places of an epoch, in constant time and without a list of them.

The whole part of a weight is laid out in layers: all samples that come at all, then all that come twice, and so on, so that copies of one
lie far apart. The fractions that are left are drawn anew in each epoch by systematic sampling: they lie one after another on a circle, and
places are points at equal distances, the first drawn from (seed, epoch). A distance is at least one whole sample, so each comes its weight
rounded down or up, up with the probability of the fraction; and every epoch has the same length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_core.data.permutation import U64, mix

_BITS = 24
_UNIT = np.uint64(1 << _BITS)
"""A weight of one, in the whole numbers that weights are counted in."""
_ROUNDING = 6
"""Keeps the draw of an epoch's first point apart from the keys of the plan, the reader and the mix."""


@dataclass(frozen=True)
class Copies:
    """Places of an epoch to places among the kept samples."""

    order: U64
    """Kept samples, those that come oftest first."""
    layers: U64
    """Where each layer ends: layer k holds the first samples of `order`, those that come k times at least."""
    owners: U64
    """Kept samples whose weight has a fraction."""
    ends: U64
    """Running total of those fractions, in units."""

    @classmethod
    def of(cls, weights: NDArray[np.floating[Any]]) -> Copies:
        """`weights`: of the kept samples, positive."""
        units = np.maximum(1, np.rint(weights.astype(np.float64) * (1 << _BITS))).astype(np.uint64)
        whole, rest = units >> np.uint64(_BITS), units & (_UNIT - np.uint64(1))
        order = np.argsort(-whole.astype(np.int64), kind="stable").astype(np.uint64)
        most = int(whole.max(initial=0))
        counts = len(whole) - np.searchsorted(np.sort(whole), np.arange(1, most + 1, dtype=np.uint64), side="left")
        owners = np.flatnonzero(rest).astype(np.uint64)
        return cls(order, np.cumsum(counts, dtype=np.uint64), owners, np.cumsum(rest[owners.astype(np.int64)], dtype=np.uint64))

    def __len__(self) -> int:
        """Of an epoch: the whole parts of the weights, and the sum of their fractions, rounded down but to one at least."""
        return self._whole + self._drawn

    @property
    def uneven(self) -> int:
        """Kept samples whose weight is not 1."""
        twice = self.order[: int(self.layers[1] - self.layers[0]) if len(self.layers) > 1 else 0]
        return len(np.union1d(twice, self.owners))

    def at(self, places: U64, epochs: U64, seed: int) -> U64:
        """The kept samples at `places` of `epochs`."""
        found = np.empty(len(places), dtype=np.uint64)
        laid = places < np.uint64(self._whole)
        layer = np.searchsorted(self.layers, places[laid], side="right")
        before = np.concatenate([np.zeros(1, dtype=np.uint64), self.layers])[layer]
        found[laid] = self.order[(places[laid] - before).astype(np.int64)]
        drawn = ~laid
        if drawn.any():
            total = self.ends[-1]
            first = mix(seed, _ROUNDING, epochs[drawn]) % total
            points = ((places[drawn] - np.uint64(self._whole)) * (total // np.uint64(self._drawn)) + first) % total
            found[drawn] = self.owners[np.searchsorted(self.ends, points, side="right")]
        return found

    @property
    def _whole(self) -> int:
        return int(self.layers[-1]) if len(self.layers) else 0

    @property
    def _drawn(self) -> int:
        return max(1, int(self.ends[-1]) >> _BITS) if len(self.ends) else 0

    def save(self, path: Path) -> None:
        """Whole or not at all, also where several processes write the same."""
        temporary = path.with_suffix(f".{np.random.default_rng().integers(2**63):x}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, order=self.order, layers=self.layers, owners=self.owners, ends=self.ends)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Copies:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["order"], arrays["layers"], arrays["owners"], arrays["ends"])
