"""What is read when: one endless order of the kept samples, as a pure function of a few numbers.

Guarantees: any position is resolved in constant time and memory; every epoch holds every kept sample once; the order does not
depend on the number of workers; global step s of K chunks is chunks [sK, (s+1)K), so the data cursor is one integer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mm_core.data.permutation import U64, invert, mix, permute
from mm_core.errors import ConfigError

_RUN_ORDER, _CHUNK_ORDER = 1, 2
"""Keeps the keys of the two shuffles apart."""


class Places(NamedTuple):
    """Where positions lead: one entry per position."""

    sources: U64
    epochs: U64
    """Of the source."""
    kept: U64
    """Place on the source's kept axis."""


@dataclass(frozen=True)
class Plan:
    """The canonical order of `samples` kept samples.

    The kept axis is tiled by runs of `run_length` neighbours (the last may be shorter). Each epoch visits the runs in an order of
    its own; epochs follow one another without a gap, and each chunk of `chunk` consecutive positions is shuffled inside.
    """

    samples: int
    seed: int
    chunk: int
    run_length: int
    kept_fingerprint: str

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError("nothing is kept to train on: `bad` in the index's index.json and `dropped` in its ledgers say why")
        if self.run_length < 1 or self.chunk % self.run_length:
            raise ConfigError(
                f"a chunk of {self.chunk} samples is no whole number of runs of {self.run_length}: give a data.run_length that divides it"
            )

    @property
    def fingerprint(self) -> str:
        """Names the order: two plans with the same fingerprint read the same samples in the same order."""
        text = f"plan-1 {self.kept_fingerprint} {self.samples} {self.seed} {self.chunk} {self.run_length}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans by source: this one."""
        return (self,)

    def locate(self, positions: U64, ahead: int = 0) -> Places:
        """What `MixedPlan.locate` gives, of one source."""
        epochs, kept = self.resolve(positions + np.uint64(ahead * self.chunk))
        return Places(np.zeros_like(epochs), epochs, kept)

    def resolve(self, positions: U64) -> tuple[U64, U64]:
        """Epoch and place on the kept axis of each global position (0, 1, 2, … without end)."""
        chunk = np.uint64(self.chunk)
        chunk_index, inside = positions // chunk, positions % chunk
        inside = permute(inside, self.chunk, mix(self.seed, _CHUNK_ORDER, chunk_index))
        shuffled = chunk_index * chunk + inside
        epochs, in_epoch = shuffled // np.uint64(self.samples), shuffled % np.uint64(self.samples)
        kept = np.empty_like(in_epoch)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            kept[chosen] = self._in_epoch(int(epoch), in_epoch[chosen])
        return epochs, kept

    def consumed(self, chunks: int) -> list[int]:
        """Samples of each source, the one there is, in the first `chunks` chunks."""
        return [chunks * self.chunk]

    def _in_epoch(self, epoch: int, positions: U64) -> U64:
        """Place on the kept axis of each position of one epoch, before the shuffle inside chunks.

        The short last run may come anywhere in the epoch's order; positions behind it are moved up by what it lacks.
        """
        runs = -(-self.samples // self.run_length)
        length = np.uint64(self.run_length)
        last_length = self.samples - (runs - 1) * self.run_length
        key = mix(self.seed, _RUN_ORDER, epoch)
        last_rank = int(invert(np.asarray([runs - 1], dtype=np.uint64), runs, key)[0])
        behind_last = positions >= np.uint64(last_rank * self.run_length + last_length)
        moved = positions + behind_last * np.uint64(self.run_length - last_length)
        return permute(moved // length, runs, key) * length + moved % length


def rank_chunks(chunks_per_step: int, rank: int, world_size: int) -> range:
    """The chunks of a global step that `rank` takes. Shares differ by one chunk at most, so every world size works."""
    return range(rank * chunks_per_step // world_size, (rank + 1) * chunks_per_step // world_size)


def rank_counts(chunks_per_step: int, chunk: int, world_size: int) -> list[int]:
    """Samples each rank takes of a global step: known to all ranks without a message."""
    return [len(rank_chunks(chunks_per_step, rank, world_size)) * chunk for rank in range(world_size)]


def chunks_per_step(global_batch_size: int, chunk: int, world_size: int) -> int:
    """K of the plan.

    Raises:
        ConfigError: the batch is no whole number of chunks, or has fewer chunks than there are ranks.
    """
    if global_batch_size < 1 or global_batch_size % chunk:
        below = global_batch_size // chunk * chunk
        raise ConfigError(
            f"global_batch_size {global_batch_size} is no multiple of the chunk of {chunk} samples: give"
            f" {f'{below} or ' if below else ''}{below + chunk}, or a data.chunk that divides it"
        )
    chunks = global_batch_size // chunk
    if chunks < world_size:
        raise ConfigError(
            f"global_batch_size {global_batch_size} is {chunks} chunks of {chunk} for {world_size} workers;"
            f" use at most {chunks} workers, a larger batch or a smaller data.chunk"
        )
    return chunks
