"""The data of a run: its indexes, what of each is kept, and the order in which they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pyarrow as pa

from mm_core.data.index import Index
from mm_core.data.labels import check_labels
from mm_core.data.ledger import Kept, Source, compile_kept
from mm_core.data.mix import Choice, MixedPlan, mixed_plan, source_seed
from mm_core.data.personal import mask_personal
from mm_core.data.plan import Plan, chunks_per_step
from mm_core.errors import ConfigError
from pipelines.train.config import TrainRun
from pipelines.train.parts import modalities_of, needs_of, num_classes, serves


@dataclass(frozen=True)
class RunData:
    """The sources of a run, opened."""

    sources: tuple[Source, ...]
    """With absolute addresses."""
    indexes: tuple[Index, ...]
    kept: tuple[Kept, ...]

    @classmethod
    def open(cls, sources: Sequence[Source]) -> RunData:
        """
        Raises:
            DataError: an index or ledger that is not there.
        """
        indexes = tuple(Index.open(source.index) for source in sources)
        there = tuple(Source(index=index.url, ledgers=source.ledgers) for index, source in zip(indexes, sources, strict=True))
        return cls(there, indexes, tuple(compile_kept(index, source.ledgers) for index, source in zip(indexes, there, strict=True)))

    @property
    def fingerprint(self) -> str:
        """Of one index that of its kept set."""
        names = [kept.fingerprint for kept in self.kept]
        return names[0] if len(names) == 1 else hashlib.blake2b(" ".join(names).encode(), digest_size=16).hexdigest()

    def check_modalities(self, run: TrainRun) -> None:
        """
        Raises:
            ConfigError: an index lacks what the model needs, or has nothing for any of its tasks.
        """
        for index in self.indexes:
            need = index.summary.need
            if missing := needs_of(run) - set(need):
                what = "pairs images with texts" if len(needs_of(run)) > 1 else f"reads {' and '.join(needs_of(run))}s"
                raise ConfigError(
                    f"the index at {index.url} was made for {' and '.join(need)} alone, but this recipe {what}: index shards that have"
                    f" {' and '.join(sorted(missing))} too, without --modality"
                )
            if not serves(run, need):
                raise ConfigError(
                    f"the index at {index.url} has {' and '.join(need)}, for which the weight of every task is 0: leave it out, or set"
                    " objective.weights"
                )

    def check_labels(self, run: TrainRun) -> None:
        """
        Raises:
            DataError: the objective is of classes, and a sample has none, or one that there is not.
        """
        if (classes := num_classes(run)) is not None:
            for index, kept in zip(self.indexes, self.kept, strict=True):
                check_labels(index, kept.ordinals, classes)

    def plan(self, run: TrainRun) -> Plan | MixedPlan:
        """What is read when.

        Raises:
            ConfigError: nothing kept; a batch, chunk or mix that does not fit.
        """
        read = modalities_of(run)
        kinds = {tuple(modality for modality in index.summary.need if modality in read) for index in self.indexes}
        if run.data.mix.choice is Choice.CHUNK and len(kinds) > 1:
            raise ConfigError(
                "the indexes differ in what their samples have, so a step must be of one of them: --set data.mix.choice=step, or index all"
                " shards with the same --modality"
            )
        chunks = chunks_per_step(run.global_batch_size, run.data.chunk, run.resources.workers)
        plans = [
            Plan(len(kept), source_seed(run.seed, source), run.data.chunk, run.data.run_length, kept.fingerprint)
            for source, kept in enumerate(self.kept)
        ]
        return mixed_plan(plans, run.data.mix, chunks)

    def captions(self, limit: int) -> Iterator[str]:
        """About `limit` captions of the samples that are kept, as training reads them, an equal share from each index that has some."""
        those = [both for both in zip(self.indexes, self.kept, strict=True) if "text" in both[0].summary.need]
        share = -(-limit // max(1, len(those)))
        return chain.from_iterable(islice(_captions(index, kept), share) for index, kept in those)


def _captions(index: Index, kept: Kept) -> Iterator[str]:
    first = 0
    for batch in index.samples(["captions"]):
        last = first + batch.num_rows
        begin, end = np.searchsorted(kept.ordinals, [first, last])
        for captions in batch["captions"].take(pa.array(kept.ordinals[begin:end] - np.uint64(first))).to_pylist():
            yield from (mask_personal(caption, kept.mask) for caption in captions or ())
        first = last
