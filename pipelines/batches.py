"""What one rank gets of each global step: which positions of the plan, and the batch that blocks of decoded samples are joined to.

Nothing here knows how the blocks are read: `stream` does that with Ray Data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mm_core.data.columns import rows_of
from mm_core.data.plan import rank_chunks
from mm_core.data.reader import ReadSpec
from mm_core.errors import StreamOrderError


@dataclass(frozen=True)
class Share:
    """Which part of every global step is this rank's."""

    rank: int
    world_size: int
    chunks_per_step: int

    @property
    def chunks(self) -> range:
        """Which of a step's chunks are this rank's."""
        return rank_chunks(self.chunks_per_step, self.rank, self.world_size)

    def positions(self, step: int, chunk: int) -> NDArray[np.uint64]:
        """The plan's positions of this rank at a global step."""
        return self.positions_of(range(step * len(self.chunks), (step + 1) * len(self.chunks)), chunk)

    def positions_of(self, chunks: range, chunk: int) -> NDArray[np.uint64]:
        """The plan's positions of this rank's `chunks`, counted from its first of step 0 on."""
        steps, within = np.divmod(np.arange(chunks.start, chunks.stop), len(self.chunks))
        firsts = (steps * self.chunks_per_step + self.chunks.start + within) * chunk
        return (firsts[:, None] + np.arange(chunk)).reshape(-1).astype(np.uint64)


@dataclass(frozen=True)
class StepMasks:
    """What a model shall predict; of a modality that a step has not, None."""

    patches: NDArray[np.bool_] | None
    """[b, patches]"""
    masked_ids: NDArray[np.int32] | None
    """[b, context_length]: the texts with their hidden words replaced."""
    tokens: NDArray[np.bool_] | None
    """[b, context_length]"""


@dataclass(frozen=True)
class StepBatch:
    """This rank's samples of one global step."""

    step: int
    images: NDArray[np.uint8] | None
    """[b, views, size, size, 3]; None in a step of a source without images."""
    input_ids: NDArray[np.int32] | None
    """[b, captions, context_length]; None in a step of a source without texts."""
    positions: NDArray[np.uint64]
    """[b]"""
    rows: pa.Table
    """`source`, `epoch`, `uid`, `replaced` and `replaced_shard` of the samples."""
    masks: StepMasks | None = None
    """What is hidden of them, where something is."""
    labels: NDArray[np.int64] | None = None
    """[b]: their classes, where those are read."""

    @property
    def replaced_in(self) -> Counter[tuple[str, str]]:
        """Samples that could not be used and were replaced, by shard and reason."""
        if self.rows["replaced"].null_count == self.rows.num_rows:
            return Counter()
        lost = self.rows.filter(self.rows["replaced"].is_valid())
        return Counter(zip(lost["replaced_shard"].to_pylist(), lost["replaced"].to_pylist(), strict=True))


def row_bytes(views: int, image_size: int, captions: int, context_length: int) -> int:
    """Decoded bytes of a sample."""
    return views * image_size**2 * 3 + captions * context_length * 4 + 64


def steps_of(spec: ReadSpec, share: Share, blocks: Iterator[pa.Table], step: int) -> Iterator[StepBatch]:
    """The blocks' steps from `step` on, each checked against the plan."""
    size, length = spec.image_size, len(share.chunks) * spec.plan.chunk
    held: list[pa.Table] = []
    for block in blocks:
        held.append(block)
        while sum(table.num_rows for table in held) >= length:
            table = held[0] if len(held) == 1 else pa.concat_tables(held)
            rows, rest = table.slice(0, length), table.slice(length)
            held = [rest] if rest.num_rows else []
            expected, positions = share.positions(step, spec.plan.chunk), rows["position"].to_numpy()
            if not np.array_equal(positions, expected):
                raise StreamOrderError(f"rank {share.rank} at step {step} expected positions {expected[:1]}… and received {positions[:1]}…")
            batch = StepBatch(
                step=step,
                images=rows_of(rows["image"], (spec.augment.views, size, size, 3), np.uint8),
                input_ids=rows_of(rows["input_ids"], spec.text_shape, np.int32),
                positions=positions,
                rows=rows.select(["source", "epoch", "uid", "replaced", "replaced_shard"]).combine_chunks(),
                masks=None if spec.masking is None else _masks(rows, spec),
                labels=rows["label"].to_numpy() if spec.labels else None,
            )
            del table, rows  # what was joined is copied, so its blocks may go
            yield batch
            step += 1


def _masks(rows: pa.Table, spec: ReadSpec) -> StepMasks:
    assert spec.masking is not None, "the caller asks"
    length = spec.text_shape[1:]
    return StepMasks(
        patches=rows_of(rows["image_mask"], (spec.masking.grid**2,), np.bool_),
        masked_ids=rows_of(rows["masked_ids"], length, np.int32),
        tokens=rows_of(rows["text_mask"], length, np.bool_),
    )
