"""Histograms of any number of values in two passes and bounded memory: how they spread gives an axis, and on it they are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int64

from mm_core.curation.quantile import Counts, count, locate, value_at

_BINS = 48
_TAIL = 0.005
"""Share at either end that may be gathered in the outermost bin."""
_LONG_TAIL = 2.0
"""How many times as long as the middle of the values an axis may be before its ends are cut."""
_LOG_FROM = 100.0
"""Ratio of the ends of the middle from which an axis is logarithmic."""


@dataclass
class Spread:
    """Where some numbers lie: ends exactly, quantiles to a hundredth of their size. Spreads of parts add up."""

    low: float = np.inf
    high: float = -np.inf
    whole: bool = True
    """All are integers."""
    cells: Counts = field(default_factory=lambda: np.zeros(1 << 16, dtype=np.int64))

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> Spread:
        """What is not finite is left out."""
        values = values[np.isfinite(values)]
        if not len(values):
            return cls()
        return cls(float(values.min()), float(values.max()), bool((values == np.rint(values)).all()), count(values.astype(np.float32)))

    def add(self, other: Spread) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.whole &= other.whole
        self.cells += other.cells

    @property
    def total(self) -> int:
        return int(self.cells.sum())

    def quantile(self, share: float) -> float:
        """The value that `share` of all are below, to a hundredth."""
        cell, _ = locate(self.cells, self.total - min(self.total - 1, int(share * self.total)))
        return min(self.high, max(self.low, value_at(cell, 0)))


@dataclass(frozen=True)
class Axis:
    """Bins side by side. What lies beyond the ends counts in the outermost."""

    edges: Float[np.ndarray, " bins+1"]
    logarithmic: bool

    @classmethod
    def of(cls, spread: Spread, marks: Sequence[float] = ()) -> Axis:
        """Of a spread of one value at least, with the `marks` on it that are not far outside."""
        middle = spread.quantile(_TAIL), spread.quantile(1 - _TAIL)
        logarithmic = middle[0] > 0 and middle[1] / middle[0] >= _LOG_FROM
        scale = np.log if logarithmic else np.positive
        (low, high), (inner, outer) = scale(_ends(spread, middle, logarithmic)), scale(middle)
        near = [scale(mark) for mark in marks if mark > 0 or not logarithmic]
        near = [mark for mark in near if inner - (outer - inner) <= mark <= outer + (outer - inner)]
        low, high = min([low, *near]), max([high, *near])
        if spread.whole and not logarithmic:
            low, high = np.floor(low), np.ceil(high)
            width = max(1, -(-int(high - low + 1) // _BINS))
            return cls(np.arange(low - 0.5, high + width, width), logarithmic)
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, _BINS + 1)
        return cls(np.exp(edges) if logarithmic else edges, logarithmic)

    def count(self, values: Float[np.ndarray, " n"], kept: Bool[np.ndarray, " n"]) -> Int64[np.ndarray, "bins 2"]:
        """How many of the values that are finite lie in each bin, kept and dropped."""
        there = np.isfinite(values)
        bins = len(self.edges) - 1
        places = np.clip(np.searchsorted(self.edges, values[there], side="right") - 1, 0, bins - 1)
        return np.bincount(places * 2 + ~kept[there], minlength=bins * 2).reshape(bins, 2)


@dataclass(frozen=True)
class Histogram:
    """Values of one column, kept and dropped."""

    axis: Axis
    spread: Spread
    counts: Int64[np.ndarray, "bins 2"]
    marks: tuple[tuple[str, float], ...] = ()
    """Thresholds, by name."""


def _ends(spread: Spread, middle: tuple[float, float], logarithmic: bool) -> tuple[float, float]:
    """All of the values, unless a few at the ends would take most of the axis."""
    low, high = spread.low, spread.high
    if logarithmic and low <= 0:
        low = middle[0]
    scale = np.log if logarithmic else np.positive
    length = scale(middle[1]) - scale(middle[0])
    if scale(high) - scale(middle[1]) > _LONG_TAIL * length > 0:
        high = middle[1]
    if scale(middle[0]) - scale(low) > _LONG_TAIL * length > 0:
        low = middle[0]
    return low, high
