"""Masks in the stream, and a mix of pairs, images and texts: the same on any number of ranks, a step of one kind on all of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mm_core.data.augment import AugmentConfig
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.masking import Masking, MaskingConfig
from mm_core.data.mix import Choice, MixConfig, mixed_plan, source_seed
from mm_core.data.plan import Plan
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.reader import PlanReader, ReadSpec
from mm_core.errors import DataError
from mm_core.models.tokenizer import caption_tokenizer, mask_token, train_bpe
from pipelines.batches import Share, StepBatch
from pipelines.index import build_index
from pipelines.stream import StreamConfig, stream

pytestmark = pytest.mark.usefixtures("ray_cluster")

CHUNK, CHUNKS, STEPS, WEIGHTS = 8, 3, 12, (3.0, 1.0, 2.0)


@pytest.fixture(scope="module")
def spec(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ReadSpec:
    folder = tmp_path_factory.mktemp("mixed")
    kinds = {"pairs": ("image", "text"), "images": ("image",), "texts": ("text",)}
    indexes = [build_index([str(corpus / "train")], str(folder / name), need=need) for name, need in kinds.items()]
    kept = [compile_kept(index) for index in indexes]
    plans = [Plan(len(one), source_seed(0, n), CHUNK, 1, one.fingerprint) for n, one in enumerate(kept)]
    tokenizer = train_bpe(["a red circle above a blue square"] * 3, vocab_size=320, context_length=16)
    masking = Masking(MaskingConfig(min_block=2), grid=4, mask_id=mask_token(tokenizer), pad_id=0, vocab_size=len(tokenizer))
    return ReadSpec(
        tuple(Source(index=index.url) for index in indexes),
        mixed_plan(plans, MixConfig(weights=WEIGHTS, choice=Choice.STEP), CHUNKS),
        24,
        AugmentConfig(),
        caption_tokenizer(tokenizer, 16),
        masking=masking,
    )


@ray.remote(num_cpus=0)
def read(spec: ReadSpec, rank: int, world_size: int, first_step: int = 0) -> list[StepBatch]:
    config = StreamConfig(block_bytes=60_000, segment_blocks=3)
    return list(stream(spec, Share(rank, world_size, CHUNKS), first_step=first_step, last_step=STEPS, config=config, cpus=1))


def parts(batch: StepBatch) -> dict[str, np.ndarray | None]:
    assert batch.masks is not None
    return {
        "images": batch.images,
        "input_ids": batch.input_ids,
        "patches": batch.masks.patches,
        "masked_ids": batch.masks.masked_ids,
        "tokens": batch.masks.tokens,
    }


def test_a_step_is_of_one_kind_and_the_same_on_any_number_of_ranks_from_any_step_on(spec: ReadSpec) -> None:
    alone, late, *ranks = ray.get([read.remote(spec, 0, 1), read.remote(spec, 0, 1, 7), read.remote(spec, 0, 2), read.remote(spec, 1, 2)])
    for step, (whole, *some) in enumerate(zip(alone, *ranks, strict=True)):
        for name, values in parts(whole).items():
            theirs = [parts(one)[name] for one in some]
            if values is None:
                assert theirs == [None, None]
            else:
                np.testing.assert_array_equal(np.concatenate(theirs), values)
        if step >= 7:
            for name, values in parts(late[step - 7]).items():
                np.testing.assert_array_equal(values, parts(whole)[name])
    kinds = Counter((batch.images is not None, batch.input_ids is not None) for batch in alone)
    assert kinds == {(True, True): 6, (True, False): 2, (False, True): 4}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_texts_come_from_tables_and_lines(kind: str, tmp_path: Path) -> None:
    texts = [f"a red circle number {n}" for n in range(3 * CHUNK)]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    index = build_index([str(tmp_path / f"a.{kind}")], str(tmp_path / "index"), need=("text",))
    kept, tokenizer = compile_kept(index), train_bpe(texts, vocab_size=320, context_length=16)
    plan = Plan(len(kept), 0, CHUNK, 1, kept.fingerprint)
    spec = ReadSpec((Source(index=index.url),), plan, 24, AugmentConfig(), caption_tokenizer(tokenizer, 16))
    alone = ray.get(read.remote(spec, 0, 1))
    assert all(batch.images is None for batch in alone)
    epoch = np.concatenate([batch.input_ids for batch in alone])[: len(texts), 0]
    assert sorted(map(tuple, epoch)) == sorted(map(tuple, caption_tokenizer(tokenizer, 16)(texts)))


def test_a_class_comes_with_its_sample(corpus: Path, tmp_path: Path) -> None:
    """On any number of ranks, and of a sample that stands in for another it is its own."""
    index = build_index([str(corpus / "zeroshot" / "test")], str(tmp_path / "index"), need=("image",))
    label_of = {row["uid"]: row["label"] for batch in index.samples(["uid", "label"]) for row in batch.to_pylist()}
    kept = compile_kept(index)
    plan = Plan(len(kept), 0, CHUNK, 1, kept.fingerprint)
    spec = ReadSpec((Source(index=index.url),), plan, 24, AugmentConfig(), None, labels=True)
    alone, *ranks = ray.get([read.remote(spec, 0, 1), read.remote(spec, 0, 2), read.remote(spec, 1, 2)])
    for whole, *some in zip(alone, *ranks, strict=True):
        assert whole.labels is not None
        assert whole.labels.tolist() == [label_of[uid] for uid in whole.rows["uid"].to_pylist()]
        np.testing.assert_array_equal(np.concatenate([one.labels for one in some]), whole.labels)

    reader = PlanReader(spec)
    problems = iter([SampleProblem(Reason.UNDECODABLE)])
    decode = reader._decode
    reader._decode = lambda *given: next(problems, None) or decode(*given)  # type: ignore[method-assign]
    table = reader.read(np.arange(CHUNK, dtype=np.uint64))
    assert table["replaced"].to_pylist() == ["undecodable", *[None] * (CHUNK - 1)]
    assert table["label"].to_pylist() == [label_of[uid] for uid in table["uid"].to_pylist()]
    reader._decode = lambda sample, *rest: decode(replace(sample, label=None), *rest)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the class that it was indexed with is gone"):
        reader.read(np.arange(CHUNK, dtype=np.uint64))


def test_what_is_hidden_is_what_the_model_does_not_see(spec: ReadSpec) -> None:
    masking = spec.masking
    assert masking is not None
    for batch in ray.get(read.remote(spec, 0, 1)):
        assert batch.masks is not None
        if batch.masks.patches is not None:
            hidden = batch.masks.patches.sum(axis=1)
            assert (hidden >= 1).all()
            assert (hidden <= 6).all()
        if batch.input_ids is not None:
            ids, masked, tokens = batch.input_ids[:, 0], batch.masks.masked_ids, batch.masks.tokens
            assert masked is not None
            assert tokens is not None
            assert tokens.any(axis=1).all()
            np.testing.assert_array_equal(ids[~tokens], masked[~tokens])
            assert (masked[tokens] == masking.mask_id).mean() > 0.5


def test_an_epoch_later_other_parts_are_hidden(spec: ReadSpec) -> None:
    """330 pairs at 24 a step and half of all steps: a sample comes again after 27 steps."""
    share = Share(0, 1, CHUNKS)

    @ray.remote(num_cpus=0)
    def far() -> list[StepBatch]:
        return list(stream(spec, share, first_step=0, last_step=34, config=StreamConfig(), cpus=1))

    seen: dict[str, list[bytes]] = {}
    for batch in ray.get(far.remote()):
        if batch.images is not None and batch.input_ids is not None:
            assert batch.masks is not None
            assert batch.masks.patches is not None
            for uid, mask in zip(batch.rows["uid"].to_pylist(), batch.masks.patches, strict=True):
                seen.setdefault(uid, []).append(mask.tobytes())
    twice = [masks for masks in seen.values() if len(masks) > 1]
    assert len(twice) > 20
    assert sum(len(set(masks)) > 1 for masks in twice) > 0.9 * len(twice)
