"""Keyed permutations of {0, …, n-1} in constant memory: a Feistel network with cycle walking, vectorised.

A format-preserving cipher (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): position i of the order is
computed, never stored, and the inverse costs the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*words: int | U64) -> U64:
    """A 64-bit hash of the words, elementwise (splitmix64's finaliser, chained). Seeds everything that is shuffled."""
    state: U64 = np.asarray(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = _scramble((state ^ np.asarray(word, dtype=np.uint64)) + _GOLDEN)
    return state


def permute(positions: U64, n: int | U64, key: int | U64) -> U64:
    """Image of `positions` under the permutation of range(n) that `key` names. `key` may be one per position."""
    return _walk(positions, n, key, forward=True)


def invert(values: U64, n: int | U64, key: int | U64) -> U64:
    """The position whose image is each of `values`: `invert(permute(x, n, k), n, k) == x`."""
    return _walk(values, n, key, forward=False)


def _walk(values: U64, n: int | U64, key: int | U64, *, forward: bool) -> U64:
    size = int(np.max(n)) if np.size(n) else 1
    half_bits = max(1, -(-max(size - 1, 1).bit_length() // 2))
    keys = [mix(key, round_number) for round_number in range(_ROUNDS)]
    shape = np.broadcast_shapes(np.shape(values), np.shape(key))
    out = _feistel(np.broadcast_to(values, shape).astype(np.uint64), keys, half_bits, forward)
    outside = out >= np.uint64(size)
    while outside.any():
        walked = _feistel(out[outside], [_select(k, outside) for k in keys], half_bits, forward)
        out[outside] = walked
        outside[outside] = walked >= np.uint64(size)
    return out


def _feistel(values: U64, keys: list[U64], half_bits: int, forward: bool) -> U64:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys if forward else reversed(keys):
        if forward:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        else:
            left, right = right ^ (_scramble(left ^ key) & mask), left
    return (left << shift) | right


def _scramble(state: U64 | np.uint64) -> U64:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(state ^ (state >> np.uint64(31)), dtype=np.uint64)


def _select(key: U64, chosen: NDArray[np.bool_]) -> U64:
    return key if key.ndim == 0 else key[chosen]
