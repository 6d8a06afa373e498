"""The exact k-th highest of any number of values, in two passes over them and bounded memory.

A float32's bits, with the sign turned, are ordered as the numbers are. The first pass counts values by the upper 16 bits, which says in
which of 65,536 cells the k-th lies; the second counts those of that cell by the lower 16. Counts of parts add up, so tasks count and
whoever gathers them adds: what the values are, and how they are divided, does not matter. (A radix select, Knuth vol. 3, 5.2.5.)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

_CELLS = 1 << 16
Counts = Int64[np.ndarray, "65536"]


def count(values: Float32[np.ndarray, " n"], cell: int | None = None) -> Counts:
    """Values by cell; or, of the values in `cell`, by their place in it. NaN counts nowhere."""
    keys = _ordered(values[~np.isnan(values)])
    if cell is None:
        return np.bincount(keys >> 16, minlength=_CELLS)
    return np.bincount(keys[keys >> 16 == cell] & 0xFFFF, minlength=_CELLS)


def locate(counts: Counts, k: int) -> tuple[int, int]:
    """The cell of the k-th highest value (from 1), and the k that is left inside it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, k))
    return _CELLS - 1 - place, k - int(above[place] - counts[::-1][place])


def value_at(cell: int, place: int) -> float:
    """The value whose bits these are."""
    key = np.uint32(cell << 16 | place)
    bits = key ^ np.uint32(0x80000000) if key >> 31 else ~key
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _ordered(values: Float32[np.ndarray, " n"]) -> NDArray[np.uint32]:
    bits = (values.astype(np.float32) + np.float32(0)).view(np.uint32)  # + 0: -0.0 and 0.0 are one value
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
