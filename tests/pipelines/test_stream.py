from __future__ import annotations

import math
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

import pipelines.stream
from mm_core.data.augment import AugmentConfig
from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.mix import Choice, MixConfig, mixed_plan, source_seed
from mm_core.data.plan import Plan
from mm_core.data.reader import PlanReader, ReadSpec
from mm_core.data.split import write_ledger
from mm_core.errors import DataError, StreamOrderError
from mm_core.models.tokenizer import caption_tokenizer, train_bpe
from pipelines.batches import Share, StepBatch, steps_of
from pipelines.index import build_index
from pipelines.stream import StreamConfig, stream

pytestmark = pytest.mark.usefixtures("ray_cluster")

CHUNK, CHUNKS, STEPS = 8, 5, 14
TINY_BLOCKS = StreamConfig(block_bytes=100_000, segment_blocks=3)
"""Several segments within a few steps, so that their seams are tested."""


def make_spec(index: Index, seed: int = 0) -> ReadSpec:
    kept = compile_kept(index)
    tokenizer = caption_tokenizer(train_bpe(["a red circle", "a blue square"] * 3, vocab_size=300, context_length=12), 12)
    augment = AugmentConfig(crop_area=(0.5, 1.0), horizontal_flip=0.5)
    return ReadSpec((Source(index=index.url),), Plan(len(kept), seed, CHUNK, 1, kept.fingerprint), 24, augment, tokenizer)


@pytest.fixture(scope="module")
def spec(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ReadSpec:
    return make_spec(build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("stream") / "index")))


@ray.remote(num_cpus=0)
def read(spec: ReadSpec, rank: int, world_size: int, first_step: int = 0) -> list[StepBatch]:
    share = Share(rank, world_size, CHUNKS)
    return list(stream(spec, share, first_step=first_step, last_step=STEPS, config=TINY_BLOCKS, cpus=1))


def global_batches(spec: ReadSpec, world_size: int, first_step: int = 0) -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Per step the images, token ids and uids of all ranks together."""
    ranks = ray.get([read.remote(spec, rank, world_size, first_step) for rank in range(world_size)])
    return [
        (
            np.concatenate([b.images for b in step]),
            np.concatenate([b.input_ids for b in step]),
            [uid for b in step for uid in b.rows["uid"].to_pylist()],
        )
        for step in zip(*ranks, strict=True)
    ]


def test_any_number_of_ranks_reads_the_same_global_batches(spec: ReadSpec) -> None:
    """Same samples, same crops, same captions; 14 steps of 40 run into the second epoch of 330."""
    alone = global_batches(spec, 1)
    assert len(alone) == STEPS
    for (images, ids, uids), (images_1, ids_1, uids_1) in zip(global_batches(spec, 3), alone, strict=True):
        assert uids == uids_1
        np.testing.assert_array_equal(images, images_1)
        np.testing.assert_array_equal(ids, ids_1)


def test_a_stream_opened_at_a_step_goes_on_as_the_whole_one(spec: ReadSpec) -> None:
    for (images, _, uids), (images_1, _, uids_1) in zip(global_batches(spec, 2, first_step=9), global_batches(spec, 1)[9:], strict=True):
        assert uids == uids_1
        np.testing.assert_array_equal(images, images_1)


def test_an_epoch_holds_every_sample_once(spec: ReadSpec) -> None:
    batches = ray.get(read.remote(spec, 0, 1))
    uids = [(e, uid) for b in batches for e, uid in zip(b.rows["epoch"].to_pylist(), b.rows["uid"].to_pylist(), strict=True)]
    first = [uid for epoch, uid in uids if epoch == 0]
    assert len(first) == len(set(first)) == 330


def test_a_sample_that_cannot_be_read_is_replaced_within_its_chunk_and_counted(corpus: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    data = (corpus / "train" / "00000.tar").read_bytes()
    shard.write_bytes(data)
    index = build_index([str(shard)], str(tmp_path / "index"))
    spec = make_spec(index)
    whole = ray.get(read.remote(spec, 0, 1))
    damaged = index.locators[3]
    shard.write_bytes(data[: damaged["start"]] + bytes(damaged["span"]) + data[damaged["start"] + damaged["span"] :])

    batches = ray.get(read.remote(spec, 0, 1))

    assert [len(b.images) for b in batches] == [CHUNK * CHUNKS] * STEPS
    replaced = sum((b.replaced_in for b in batches), Counter())[str(shard), "changed"]
    before = [uid for b in whole for uid in b.rows["uid"].to_pylist()]
    after = [uid for b in batches for uid in b.rows["uid"].to_pylist()]
    lost = before[next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)]
    assert replaced == before.count(lost) > 1
    assert sum((b.replaced_in for b in batches), Counter()) == {(str(shard), "changed"): replaced}
    assert lost not in after
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        assert a == b or b in before[i // CHUNK * CHUNK : i // CHUNK * CHUNK + CHUNK]


def test_a_chunk_without_a_usable_sample_is_filled_from_those_that_follow(corpus: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    data = bytearray((corpus / "train" / "00000.tar").read_bytes())
    shard.write_bytes(data)
    index = build_index([str(shard)], str(tmp_path / "index"))
    for row in index.locators[: len(index.locators) // 2]:
        data[row["start"] : row["start"] + 512] = bytes(512)
    shard.write_bytes(data)
    reader = PlanReader(replace(make_spec(index), plan=replace(make_spec(index).plan, chunk=2)))

    positions = np.arange(200, dtype=np.uint64)
    rows = reader.read(positions)

    used, reasons = rows["uid"].to_pylist(), rows["replaced"].to_pylist()
    empty = [i for i in range(0, 200, 2) if reasons[i] and reasons[i + 1]]
    assert 75 < reasons.count("changed") < 125
    assert len(empty) > 10
    assert all(used)
    alone = [uid for i in range(0, 200, 2) for uid in reader.read(positions[i : i + 2])["uid"].to_pylist()]
    assert used == alone  # whatever block a chunk is read in


@pytest.mark.parametrize(
    ("shards", "damaged"), [(1, 0), (2, 0), (5, 0), (5, 4)], ids=["one sample", "fewer shards than ranks", "tiny shards", "one sample left"]
)
def test_ranks_take_equal_steps_however_little_there_is(shards: int, damaged: int, corpus: Path, tmp_path: Path) -> None:
    """Shards of one sample each, three ranks; `damaged` of them are overwritten once they are indexed."""
    with tarfile.open(corpus / "train" / "00000.tar") as whole:
        members = whole.getmembers()[: 3 * shards]
        for number in range(shards):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as shard:
                for member in members[3 * number : 3 * number + 3]:
                    shard.addfile(member, whole.extractfile(member))
    index = build_index([str(tmp_path / "*.tar")], str(tmp_path / "index"))
    assert index.summary.samples == shards
    for number in range(damaged):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes(path.stat().st_size))

    ranks = ray.get([read.remote(make_spec(index), rank, 3) for rank in range(3)])

    assert [len(batches) for batches in ranks] == [STEPS] * 3
    uids = [uid for batches in ranks for batch in batches for uid in batch.rows["uid"].to_pylist()]
    replaced = sum((batch.replaced_in for batches in ranks for batch in batches), Counter()).total()
    assert len(uids) == STEPS * CHUNK * CHUNKS
    assert len(set(uids)) == shards - damaged
    assert abs(replaced - len(uids) * damaged / shards) <= shards


def test_shards_that_are_gone_stop_the_stream_with_one_clear_error(corpus: Path, tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes((corpus / "train" / "00000.tar").read_bytes())
    spec = make_spec(build_index([str(shard)], str(tmp_path / "index")))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(read.remote(spec, 0, 1))
    assert isinstance(caught.value.cause, DataError)
    assert "moved or changed since it was indexed" in str(caught.value.cause)


@ray.remote(num_cpus=0)
def reads_at_once(spec: ReadSpec, cpus: int, folder: Path) -> int:
    """The most blocks that were being read at a time, each half a second, where a step is five of them."""
    whole = pipelines.stream._read_block

    def slow(*arguments: Any) -> Callable[[], Iterator[pa.Table]]:
        read = whole(*arguments)

        def watched() -> Iterator[pa.Table]:
            began = time.time()
            time.sleep(0.5)
            yield from read()
            (folder / f"{began}").write_text(str(time.time()))

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.stream, "_read_block", slow)
        config = StreamConfig(block_bytes=1)
        list(stream(spec, Share(0, 1, CHUNKS), first_step=0, last_step=8, config=config, cpus=cpus))
    spans = [(float(path.name), float(path.read_text())) for path in folder.iterdir()]
    assert len(spans) == 8 * CHUNKS
    return max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)


@pytest.mark.parametrize("cpus", [1, 4])
def test_all_cpus_of_a_rank_read_however_long_a_step_is(cpus: int, spec: ReadSpec, tmp_path: Path) -> None:
    assert ray.get(reads_at_once.remote(spec, cpus, tmp_path)) == cpus


@ray.remote(num_cpus=0)
def left_of_a_stream_that_is_closed(spec: ReadSpec) -> list[str]:
    """Threads that still run a little later: as where a run is rolled back, its stream is left at a batch."""
    batches = stream(spec, Share(0, 1, CHUNKS), first_step=0, last_step=10_000, config=TINY_BLOCKS, cpus=1)
    next(batches)
    assert [each for each in threading.enumerate() if each.name == "mm-stream"]
    batches.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 120
    while (left := [each.name for each in threading.enumerate() if each.name == "mm-stream"]) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def test_a_stream_that_is_closed_leaves_no_thread(spec: ReadSpec) -> None:
    assert ray.get(left_of_a_stream_that_is_closed.remote(spec)) == []


@pytest.mark.parametrize(
    ("config", "cpus", "room", "expected"),
    [
        (StreamConfig(), 1, math.inf, 4),
        (StreamConfig(), 16, math.inf, 32),
        (StreamConfig(), 16, 10.5, 10),
        (StreamConfig(), 16, 1, 4),
        (StreamConfig(ahead_blocks=2), 16, 1, 2),
    ],
)
def test_how_far_it_reads_ahead(config: StreamConfig, cpus: float, room: float, expected: int) -> None:
    assert config.blocks_ahead(cpus, room) == expected


def test_a_step_that_is_read_in_parts_is_the_same(spec: ReadSpec) -> None:
    """Blocks of a chunk, of seven chunks and of all, where a step is five."""
    share, whole = Share(0, 1, CHUNKS), PlanReader(spec).read(np.arange(STEPS * CHUNKS * CHUNK, dtype=np.uint64))
    expected = list(steps_of(spec, share, iter([whole]), 0))
    assert len(expected) == STEPS
    for chunks in (1, 7):
        blocks = (whole.slice(first, chunks * CHUNK) for first in range(0, len(whole), chunks * CHUNK))
        for found, step in zip(steps_of(spec, share, blocks, 0), expected, strict=True):
            assert found.step == step.step
            assert found.rows.equals(step.rows)
            for name in ("images", "input_ids", "positions"):
                np.testing.assert_array_equal(getattr(found, name), getattr(step, name))


def test_a_block_out_of_order_is_an_error(spec: ReadSpec) -> None:
    share = Share(0, 1, CHUNKS)
    block = PlanReader(spec).read(share.positions(1, CHUNK))
    assert next(steps_of(spec, share, iter([block]), 1)).step == 1
    with pytest.raises(StreamOrderError, match="step 0 expected positions"):
        next(steps_of(spec, share, iter([block]), 0))


@pytest.fixture(scope="module")
def mixed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReadSpec, Index, Index]:
    """Two indexes of different shards, three chunks of the first to one of the second."""
    folder, shards = tmp_path_factory.mktemp("mixed"), sorted((corpus / "train").glob("*.tar"))
    first = build_index([str(s) for s in shards[:1]], str(folder / "a"))
    second = build_index([str(s) for s in shards[1:]], str(folder / "b"))
    return make_mix(first, second, MixConfig(weights=(3, 1))), first, second


def make_mix(first: Index, second: Index, config: MixConfig) -> ReadSpec:
    kept = [compile_kept(index) for index in (first, second)]
    plans = [Plan(len(k), source_seed(0, i), CHUNK, 1, k.fingerprint) for i, k in enumerate(kept)]
    return replace(make_spec(first), plan=mixed_plan(plans, config, CHUNKS), sources=(Source(index=first.url), Source(index=second.url)))


def index_uids(index: Index) -> set[str]:
    return {uid for batch in index.samples(["uid"]) for uid in batch["uid"].to_pylist()}


def test_two_indexes_are_read_in_exact_proportions_by_any_number_of_ranks(mixed: tuple[ReadSpec, Index, Index]) -> None:
    spec, first, second = mixed
    steps = [uids for _, _, uids in global_batches(spec, 1)]
    ours, theirs = index_uids(first), index_uids(second)
    assert ours.isdisjoint(theirs)
    chunks = [uid in theirs for uid in np.concatenate(steps)[::CHUNK]][: CHUNKS * STEPS // 4 * 4]
    assert sum(chunks) == len(chunks) // 4
    uids = np.concatenate(steps).tolist()
    assert all(len({uid in theirs for uid in uids[i : i + CHUNK]}) == 1 for i in range(0, len(uids), CHUNK))
    for world_size, first_step in ((2, 0), (3, 0), (2, 9)):
        others = global_batches(spec, world_size, first_step)
        assert [uids for _, _, uids in others] == steps[first_step:]


def test_the_first_source_of_a_mix_keeps_its_order_and_its_crops(mixed: tuple[ReadSpec, Index, Index]) -> None:
    spec, first, _ = mixed
    positions = np.arange(16 * CHUNK, dtype=np.uint64)
    rows = PlanReader(spec).read(positions)
    of_first = rows.filter(np.equal(rows["source"].to_numpy(), 0))
    alone = PlanReader(make_spec(first)).read(positions[: 12 * CHUNK])
    assert of_first.num_rows == alone.num_rows
    for column in ("uid", "epoch", "image", "input_ids"):
        assert of_first[column].to_pylist() == alone[column].to_pylist()


def test_a_step_is_of_one_source_where_the_mix_says_so(mixed: tuple[ReadSpec, Index, Index]) -> None:
    _, first, second = mixed
    batches = ray.get(read.remote(make_mix(first, second, MixConfig(weights=(1, 1), choice=Choice.STEP)), 0, 1))
    sources = [set(batch.rows["source"].to_pylist()) for batch in batches]
    assert all(len(s) == 1 for s in sources)
    assert sum(s == {1} for s in sources) == STEPS // 2


def test_image_only_and_text_only_sources_are_steps_of_their_own(corpus: Path, tmp_path: Path) -> None:
    """What a multitask run reads: each step of one modality, with nothing in the place of the other."""
    shards = sorted((corpus / "train").glob("*.tar"))
    pictures = build_index([str(shards[0])], str(tmp_path / "pictures"), need=("image",))
    texts = build_index([str(shards[1])], str(tmp_path / "texts"), need=("text",))
    spec = make_mix(pictures, texts, MixConfig(weights=(2, 1), choice=Choice.STEP))
    alone = ray.get(read.remote(spec, 0, 1))
    pairs = [ray.get(read.remote(spec, rank, 2)) for rank in range(2)]
    for whole, *parts in zip(alone, *pairs, strict=True):
        (source,) = set(whole.rows["source"].to_pylist())
        assert (whole.images is None, whole.input_ids is None) == (source == 1, source == 0)
        for name in ("images", "input_ids"):
            if (values := getattr(whole, name)) is not None:
                assert len(values) == CHUNK * CHUNKS
                np.testing.assert_array_equal(values, np.concatenate([getattr(part, name) for part in parts]))
    assert sum(batch.images is None for batch in alone) in (len(alone) // 3, len(alone) // 3 + 1)


def test_weights_of_a_ledger_are_how_often_a_sample_comes(corpus: Path, tmp_path: Path) -> None:
    """Over four epochs: a weight of 2 eight times, of 0.5 twice on average and never twice in one epoch, of 0 never."""
    index = build_index([str(sorted((corpus / "train").glob("*.tar"))[0])], str(tmp_path / "index"))
    rows = index.summary.rows
    weights = np.resize(np.array([2, 1, 0.5, 0], dtype=np.float32), rows)
    write_ledger(index, "weighted", rule="test", repeat=weights, reason="test")
    kept = compile_kept(index, ["weighted"])
    plan = Plan(len(kept), 0, CHUNK, 1, kept.fingerprint)
    spec = replace(make_spec(index), plan=plan, sources=(Source(index=index.url, ledgers=("weighted",)),))
    chunks = len(kept) * 4 // CHUNK
    read_rows = PlanReader(spec).read(np.arange(chunks * CHUNK, dtype=np.uint64))
    uids = [uid for batch in index.samples(["uid"]) for uid in batch["uid"].to_pylist()]
    seen = Counter(read_rows["uid"].to_pylist())
    of_weight = {w: [seen[uid] for uid, weight in zip(uids, weights, strict=True) if weight == w] for w in (2, 1, 0.5, 0)}
    assert set(of_weight[0]) == {0}
    assert sum(of_weight[2]) >= 8 * len(of_weight[2]) - CHUNK
    assert max(of_weight[2]) == 8
    assert abs(np.mean(of_weight[0.5]) - 2) < 0.3
    twice = [(e, u) for e, u in zip(read_rows["epoch"].to_pylist(), read_rows["uid"].to_pylist(), strict=True) if u == uids[0]]
    images = read_rows.filter(np.equal(read_rows["uid"].to_numpy(zero_copy_only=False), uids[0]))["image"].to_pylist()
    assert len(twice) == len(set(images)), "a sample that comes twice in an epoch is cropped twice"
