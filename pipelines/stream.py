"""The stream of one rank: a Ray Data dataset made in the Train worker from the data cursor, in strict order, without end.

Guarantees: rank r of n receives, for each global step, exactly the chunks the plan gives it, in order, or `StreamOrderError`.
A block is one read task: some of this rank's chunks, part of a step or several steps. The order runs in segments of a bounded number of
blocks, so the task list stays small; the next segment is opened before the last ends.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray
import ray.data
from pydantic import Field
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from mm_core.config import Config
from mm_core.data.reader import PlanReader, ReadSpec
from mm_core.errors import StreamOrderError
from pipelines import exported
from pipelines.batches import Share, StepBatch, row_bytes, steps_of
from pipelines.causes import own_error

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_FEWEST_AHEAD = 4
_SEGMENTS_AHEAD = 16
_LOOK_S = 0.5
_CONTEXT = threading.Lock()
"""Ray Data's context is one of a process, and a stream's segments are opened by several threads."""
_REST_S = 0.02
_WORKING_ROUNDS = 5


class StreamConfig(Config):
    """How far the stream reads ahead, and what it may use."""

    block_bytes: int = Field(default=64 << 20, gt=0, description="Decoded bytes of one block, at most (one chunk at least).")
    segment_blocks: int | None = Field(default=None, gt=0, description="Read tasks planned at a time; by default 16 times those ahead.")
    ahead_blocks: int | None = Field(
        default=None,
        gt=0,
        description="Blocks being decoded and held in the object store ahead of the training loop; by default two for each CPU that"
        " reads, as far as the rank's share of a quarter of the store goes, and four at least.",
    )
    cpus_per_rank: float | None = Field(default=None, gt=0, description="CPUs for reading, per rank; by default an equal share of all.")

    def chunks_per_block(self, chunk_bytes: int) -> int:
        """How many chunks of `chunk_bytes` decoded bytes a block holds, once the stream is under way."""
        return max(1, self.block_bytes // max(1, chunk_bytes))

    def blocks_ahead(self, cpus: float, room: float = math.inf) -> int:
        """Each CPU's own block, and as many that are decoded and wait: for the loop, or for one before them.

        Args:
            room: how many the object store may hold; `ahead_blocks` and the least that a stream needs do not ask.
        """
        return self.ahead_blocks or int(max(_FEWEST_AHEAD, min(2 * math.ceil(cpus), room)))


def stream(spec: ReadSpec, share: Share, *, first_step: int, last_step: int, config: StreamConfig, cpus: float) -> Iterator[StepBatch]:
    """Batches of this rank for the global steps [first_step, last_step).

    Raises:
        StreamOrderError: a block is not the one that the plan puts next.
        DataError: from the reader, where nothing of a chunk can be used.
    """
    block_bytes = max(config.block_bytes, spec.plan.chunk * _row_bytes(spec))
    ahead = config.blocks_ahead(cpus, _room(cpus) / block_bytes)
    segments = _segments(spec, share, first_step, last_step, config, ahead)
    start = partial(_open, spec, ray.put(spec), share, ahead * block_bytes, cpus)
    stopped = threading.Event()
    # Where a step is several blocks, joining them copies it: a thread does, while the loop takes the step before.
    batches = _Ahead(lambda: steps_of(spec, share, _opened_ahead(segments, start, ahead, stopped), first_step), 1, stopped)
    step = first_step
    try:
        for batch in batches:
            yield batch
            step += 1
    finally:
        stopped.set()
    if step != last_step:
        raise StreamOrderError(f"the stream ended at step {step}, {last_step} were planned")


def node_resources() -> dict[str, float]:
    """What Ray counts on this process' node."""
    here = ray.get_runtime_context().get_node_id()
    return next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})


def _room(cpus: float) -> float:
    """Bytes of this node's object store for one segment of a rank that reads with so many of its CPUs: a quarter of their share, since two
    segments are open where one follows another, and batches and checkpoints go through the store too."""
    node = node_resources()
    return node.get("object_store_memory", math.inf) / 4 * min(1.0, cpus / max(1.0, node.get("CPU", 1.0)))


def _segments(spec: ReadSpec, share: Share, first: int, last: int, config: StreamConfig, ahead: int) -> Iterator[list[range]]:
    """The blocks of the steps [first, last), a segment at a time: each the rank's chunks that one task reads. A block is part of a step
    or several, so that all CPUs read however long a step is. Early blocks are short, so that the first batch comes soon."""
    most = config.chunks_per_block(spec.plan.chunk * _row_bytes(spec))
    begin, end = first * len(share.chunks), last * len(share.chunks)
    blocks: list[range] = []
    length = 1
    while begin < end:
        blocks.append(range(begin, min(begin + length, end)))
        begin, length = blocks[-1].stop, min(length * 2, most)
        if len(blocks) == (config.segment_blocks or _SEGMENTS_AHEAD * ahead):
            yield blocks
            blocks = []
    if blocks:
        yield blocks


def _row_bytes(spec: ReadSpec) -> int:
    return row_bytes(spec.augment.views, spec.image_size, *spec.text_shape)


class _SegmentSource(Datasource):
    """The blocks of one segment as Ray Data read tasks."""

    def __init__(self, spec: ReadSpec, spec_ref: ray.ObjectRef, share: Share, blocks: list[range]) -> None:
        super().__init__()
        self._spec, self._spec_ref, self._share, self._blocks = spec, spec_ref, share, blocks

    def get_name(self) -> str:
        return "Plan"

    def estimate_inmemory_data_size(self) -> int | None:
        return sum(self._rows(block) for block in self._blocks) * _row_bytes(self._spec)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task per block, whatever parallelism is asked for: the blocks are the order."""
        tasks = []
        for block in self._blocks:
            rows = self._rows(block)
            metadata = BlockMetadata(num_rows=rows, size_bytes=rows * _row_bytes(self._spec), input_files=None, exec_stats=None)
            tasks.append(ReadTask(_read_block(self._spec_ref, self._spec.plan.fingerprint, self._share, block), metadata))
        return tasks

    def _rows(self, block: range) -> int:
        return len(block) * self._spec.plan.chunk


def _read_block(spec_ref: ray.ObjectRef, fingerprint: str, share: Share, block: range) -> Any:
    """A read function. The spec travels as a reference: it is fetched once per process, not once per task."""

    def read() -> Iterator[pa.Table]:
        reader, began = _reader(_Fetch(spec_ref, fingerprint)), time.monotonic()
        rows = reader.read(share.positions_of(block, reader.spec.plan.chunk))
        _count(rows, time.monotonic() - began)
        yield rows

    return read


def _count(rows: pa.Table, seconds: float) -> None:
    exported.observe(exported.BLOCK_SECONDS, seconds)
    exported.add(exported.BLOCK_SAMPLES, rows.num_rows)
    for reason, samples in Counter(rows["replaced"].drop_null().to_pylist()).items():
        exported.add(exported.BLOCK_REPLACED, samples, reason=reason)


class _Fetch:
    """A reference that compares by what it stands for, so that the cache below serves every task of a run."""

    def __init__(self, ref: ray.ObjectRef, fingerprint: str) -> None:
        self.ref, self.fingerprint = ref, fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fetch) and other.ref == self.ref

    def __hash__(self) -> int:
        return hash(self.ref)


@lru_cache(maxsize=2)
def _reader(fetch: _Fetch) -> PlanReader:
    return PlanReader(ray.get(fetch.ref), reuse_memory=True)


class _Rest(ExecutionCallback):
    """Lets the executor's loop rest where it would spin.

    Ray 2.60's loop waits for a running task, but not where all is decoded that may be: it then turns without a pause, in the training
    process, and takes half its time through the interpreter lock (110 instead of 240 samples/s). A few quick rounds are its work after
    a task has ended; more of them are a spin.
    """

    def __init__(self) -> None:
        self._quick_rounds = 0
        self._resumed = time.perf_counter()

    def on_execution_step(self, executor: Any) -> None:
        quick = time.perf_counter() - self._resumed < _REST_S
        self._quick_rounds = self._quick_rounds + 1 if quick else 0
        if self._quick_rounds > _WORKING_ROUNDS:
            time.sleep(_REST_S)
        self._resumed = time.perf_counter()


def _open(spec: ReadSpec, spec_ref: ray.ObjectRef, share: Share, memory: int, cpus: float, blocks: list[range]) -> Iterator[pa.Table]:
    """Start a segment's dataset and return its blocks as they come.

    Args:
        memory: bytes of blocks in the object store, those under way included.
    """
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    context.execution_options.preserve_order = True
    # Without a bound on memory Ray Data decodes ahead until half the object store is full: gigabytes, lost at every restart, and on a
    # CPU taken from the training that runs beside it.
    # A limit below what the tasks in flight will make keeps CPUs idle, too.
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(cpu=cpus, object_store_memory=memory)
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Rest]
    with _CONTEXT, ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(
            _SegmentSource(spec, spec_ref, share, blocks),
            override_num_blocks=len(blocks),
            num_cpus=min(1.0, cpus),
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
    return iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))


class _Ahead(Generic[Item]):
    """Items of an iterator that a thread pulls, a few before they are asked for: Ray Data, too, works only while it is pulled."""

    def __init__(self, items: Callable[[], Iterator[Item]], ahead: int, stopped: threading.Event) -> None:
        """
        Args:
            stopped: of all threads of a stream: they end, and so does who waits for one of them.
        """
        self._queue: queue.Queue[Item | _End] = queue.Queue(maxsize=ahead)
        self._stopped = stopped
        threading.Thread(target=self._run, args=(items,), name="mm-stream", daemon=True).start()

    def __iter__(self) -> Iterator[Item]:
        while not self._stopped.is_set():
            try:
                item = self._queue.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return

    def _run(self, items: Callable[[], Iterator[Item]]) -> None:
        try:
            for item in items():
                if not self._put(item):
                    return
            self._put(_End())
        except BaseException as error:
            self._put(_End(own_error(error) or error))

    def _put(self, item: Item | _End) -> bool:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=_LOOK_S)
                return True
        return False


@dataclass(frozen=True)
class _End:
    """Of what a thread pulls."""

    error: BaseException | None = None


def _opened_ahead(
    segments: Iterator[list[range]], start: Callable[[list[range]], Iterator[pa.Table]], ahead: int, stopped: threading.Event
) -> Iterator[pa.Table]:
    """The blocks of all segments in a row, each segment opened when the one before it has as many blocks left as are read ahead: its last
    are under way then, and CPUs would idle. A first block took 0.5 to 4 s on a busy machine."""

    def opened() -> tuple[int, _Ahead[pa.Table]] | None:
        blocks = next(segments, None)
        return (len(blocks), _Ahead(partial(start, blocks), 2, stopped)) if blocks else None

    reading = opened()
    while reading is not None:
        (blocks, tables), following, delivered = reading, None, 0
        for delivered, table in enumerate(islice(tables, blocks), 1):  # not waiting for what else ends a dataset
            if following is None and delivered >= blocks - ahead:
                following = opened()
            yield table
        if delivered < blocks:
            raise StreamOrderError("a segment of the stream ended before all its blocks came")
        reading = following
