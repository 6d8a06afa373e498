"""What it costs to read a run's data from an object store: requests, bytes and money, counted on a sample of the run's own blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mm_core.address import is_local
from mm_core.data.plan import chunks_per_step
from mm_core.data.ranged import Span, gather
from mm_core.data.reader import IndexReader
from mm_core.models.dvae import DvaeConfig
from pipelines.batches import Share, row_bytes
from pipelines.train.config import TrainRun
from pipelines.train.run_data import RunData

_BLOCKS = 32
EXPORT_ABOVE = 2.0
"""Bytes read per byte needed from which on it is worth writing the kept samples into shards of their own."""


@dataclass(frozen=True)
class Prices:
    """By default those of S3 standard, read from the same region."""

    per_1000_requests: float = 0.0004
    """Dollars."""
    per_gb: float = 0.0
    """Dollars for 10^9 bytes."""


@dataclass(frozen=True)
class ReadCost:
    """Of reading some samples."""

    samples: int
    requests: int
    bytes_read: int
    bytes_needed: int

    @property
    def amplification(self) -> float:
        """Bytes read per byte of the samples themselves."""
        return self.bytes_read / self.bytes_needed

    def report(self, samples: int, prices: Prices, samples_per_s: float | None) -> dict[str, float]:
        """For a run of `samples` samples. Without a rate the requests are those for each sample/s."""
        requests, gigabytes = self.requests / self.samples, self.bytes_read / self.samples / 1e9
        cost = samples * (requests / 1000 * prices.per_1000_requests + gigabytes * prices.per_gb)
        rate = "requests_per_s" if samples_per_s else "requests_per_s_for_each_sample_per_s"
        return {
            rate: round(requests * (samples_per_s or 1), 4),
            "read_amplification": round(self.amplification, 3),
            "requests": round(samples * requests),
            "read_gb": round(samples * gigabytes, 3),
            "cost_usd": round(cost, 4),
        }


def read_cost(data: RunData, run: TrainRun, *, blocks: int = _BLOCKS) -> ReadCost | None:
    """Counted on up to `blocks` blocks, evenly spread over the run, with the locators and the plan that the run will read by: what the
    read tasks would ask of the store. None where every shard is a local file."""
    readers = [IndexReader(index) for index in data.indexes]
    plan, chunks = data.plan(run), chunks_per_step(run.global_batch_size, run.data.chunk, run.resources.workers)
    share = Share(0, run.resources.workers, chunks)
    texts = (0, 0) if isinstance(run.model, DvaeConfig) else (run.data.captions, run.model.context_length)
    each = run.stream.chunks_per_block(run.data.chunk * row_bytes(run.data.augment.views, run.model.image_size, *texts))
    end = run.steps * len(share.chunks)
    samples = requests = read = needed = 0
    for first in np.unique(np.linspace(0, max(0, end - each), blocks).astype(int) // each * each).tolist():
        positions = share.positions_of(range(first, min(first + each, end)), run.data.chunk)
        places = plan.locate(positions)
        samples += len(positions)
        for source, (reader, kept) in enumerate(zip(readers, data.kept, strict=True)):
            rows = places.sources == source
            ordinals = np.unique(kept.at(places.kept[rows], places.epochs[rows], plan.plans[source].seed))
            spans: list[Span] = [span for span in reader.spans(ordinals) if not is_local(span.url)]
            asked = gather(spans, run.data.gap_bytes)
            requests, read = requests + len(asked), read + sum(request.span.size for request in asked)
            needed += sum(span.size for span in spans)
    return ReadCost(samples, requests, read, needed) if needed else None
