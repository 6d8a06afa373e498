"""Groups of duplicates out of pairs: what hangs together through any chain of pairs is one group.

A chain can join two samples that are no pair themselves: the first and last of many, each a little different from the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Pairs = Int64[np.ndarray, "n 2"]
NO_PAIRS: Pairs = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class Groups:
    """Samples that have a duplicate, ascending, and the group of each: the lowest sample in it."""

    samples: NDArray[np.int64]
    groups: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(np.unique(self.groups))

    @property
    def largest(self) -> int:
        return int(np.unique(self.groups, return_counts=True)[1].max(initial=0))

    def best(self, *keys: NDArray[np.number]) -> NDArray[np.int64]:
        """Of each sample's group the sample with the highest key, where several have it with the highest next key, at last the lowest
        sample. NaN is below every number."""
        ranked = [np.where(np.isnan(key), -np.inf, key) if key.dtype.kind == "f" else key for key in keys]
        order = np.lexsort((self.samples, *(_descending(key) for key in reversed(ranked)), self.groups))
        first = np.r_[True, self.groups[order][1:] != self.groups[order][:-1]][: len(order)]
        winners = self.samples[order][first]
        return np.asarray(winners[np.searchsorted(self.groups[order][first], self.groups)])


def grouped(pairs: Pairs) -> Groups:
    """The connected components of the pairs."""
    samples, places = np.unique(pairs, return_inverse=True)
    if not len(samples):
        return Groups(samples, samples)
    places = places.reshape(-1, 2)
    edges = coo_array((np.ones(len(pairs), dtype=bool), (places[:, 0], places[:, 1])), shape=(len(samples), len(samples)))
    _, labels = connected_components(edges, directed=False)
    lowest = np.full(int(labels.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(lowest, labels, samples)
    return Groups(samples, lowest[labels])


def forest(pairs: Pairs) -> Pairs:
    """Fewer pairs with the same groups: each sample with the lowest of its group. At most as many as samples, however many pairs."""
    found = grouped(pairs)
    other = found.samples != found.groups
    return np.stack([found.groups[other], found.samples[other]], axis=1)


def lowest_match(pairs: Pairs) -> Pairs:
    """Of each first sample one pair: that with the lowest second."""
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return ordered[np.r_[True, ordered[1:, 0] != ordered[:-1, 0]]] if len(ordered) else ordered


def _descending(key: NDArray[np.number]) -> NDArray[np.number]:
    return -key.astype(np.float64) if key.dtype.kind == "f" else -key.astype(np.int64)
