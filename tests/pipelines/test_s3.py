"""Everything that lies in an object store: moto's server stands for S3 (`tests/object_store.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import mm
from mm_core.bundle import load_bundle
from mm_core.data.augment import AugmentConfig
from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.plan import Plan
from mm_core.data.ranged import RangedReader, Span
from mm_core.data.reader import IndexReader, PlanReader, ReadSpec
from mm_core.data.split import split
from mm_core.errors import DataError
from mm_core.models.tokenizer import caption_tokenizer, train_bpe
from mm_core.store import open_store
from pipelines.cli import resolve_run
from pipelines.curate.export import Export
from pipelines.curate.subset import export_uids, import_uids
from pipelines.index import build_index
from pipelines.shards import check_shards
from pipelines.train.dry_run import describe
from pipelines.train.read_cost import Prices, read_cost
from pipelines.train.run_data import RunData
from tests.object_store import ObjectStore

pytestmark = pytest.mark.usefixtures("ray_cluster")


def bucket(name: str) -> str:
    fs, path = open_store(f"s3://{name}")
    fs.mkdir(path)
    return f"s3://{name}"


def upload(source: Path, target: str) -> None:
    fs, path = open_store(target)
    fs.pipe_file(path, source.read_bytes())


@pytest.fixture(scope="module")
def shards(object_store: ObjectStore, corpus: Path) -> str:
    object_store.faults()
    folder = f"{bucket('shards')}/train"
    for shard in sorted((corpus / "train").glob("*.tar")):
        upload(shard, f"{folder}/{shard.name}")
    return folder


@pytest.fixture(scope="module")
def index(shards: str) -> Index:
    return build_index([shards], f"{bucket('indexes')}/first")


def make_spec(index: Index, ledgers: tuple[str, ...] = (), run_length: int = 8) -> ReadSpec:
    kept = compile_kept(index, ledgers)
    tokenizer = caption_tokenizer(train_bpe(["a red circle", "a blue square"] * 3, vocab_size=300, context_length=12), 12)
    plan = Plan(len(kept), 0, 8, run_length, kept.fingerprint)
    return ReadSpec((Source(index=index.url, ledgers=ledgers),), plan, 24, AugmentConfig(crop_area=(0.5, 1.0)), tokenizer)


POSITIONS = np.arange(320, dtype=np.uint64)


def test_index_ledger_and_stream_are_those_of_the_local_disk(index: Index, corpus: Path, tmp_path: Path) -> None:
    local = build_index([str(corpus / "train")], str(tmp_path / "index"))
    assert index.summary == local.summary
    assert index.shard_urls == [f"s3://shards/train/{n:05d}.tar" for n in range(4)]
    for each in (index, local):
        split(each, heldout=0.2, seed=3)
    assert PlanReader(make_spec(index, ("train",))).read(POSITIONS) == PlanReader(make_spec(local, ("train",))).read(POSITIONS)


def test_with_faults_and_latency_nothing_is_lost(index: Index, object_store: ObjectStore) -> None:
    spec = replace(make_spec(index, run_length=1), gap_bytes=0, verify=True)
    calm, reader = PlanReader(spec).read(POSITIONS), PlanReader(spec)
    object_store.faults(fail=0.05, latency_s=0.1)
    try:
        blocks = [reader.read(positions) for positions in np.split(POSITIONS, 5)]
        counts = object_store.counts()
    finally:
        object_store.faults()
    rows = pa.concat_tables(blocks)
    assert counts["requests"] > 200
    assert counts["failed"] > 3
    assert rows["replaced"].null_count == len(rows)
    assert rows.select(["uid", "input_ids", "image"]).to_pydict() == calm.select(["uid", "input_ids", "image"]).to_pydict()


def test_a_range_that_never_comes_is_a_counted_problem(shards: str, object_store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    good, gone = Span(f"{shards}/00000.tar", 0, 512), Span(f"{shards}/gone.tar", 0, 512)
    beyond = Span(f"{shards}/00000.tar", 1 << 40, 512)
    first, second, third = RangedReader().read([good, gone, beyond])
    assert isinstance(first, bytes)
    assert "gone.tar bytes 0-512: " in str(second)
    assert str(third).startswith("read_failed")
    assert "1 of 3 reads failed" in caplog.text  # waiting does not bring what is not there


def test_from_a_base_only_what_has_another_etag_is_read(shards: str, index: Index, corpus: Path, object_store: ObjectStore) -> None:
    copied = f"{bucket('growing')}/train"
    for number in range(2):
        upload(corpus / "train" / f"{number:05d}.tar", f"{copied}/{number:05d}.tar")
    first = build_index([copied], "s3://indexes/growing-1")
    upload(corpus / "train" / "00002.tar", f"{copied}/00001.tar")  # another content
    upload(corpus / "train" / "00003.tar", f"{copied}/00003.tar")
    object_store.faults()
    second = build_index([copied], "s3://indexes/growing-2", base=first.url)
    with_base = object_store.counts()["bytes"]
    object_store.faults()
    whole = build_index([copied], "s3://indexes/growing-3")
    assert second.summary == whole.summary
    fs, path = open_store(copied)
    assert with_base < object_store.counts()["bytes"]
    assert [row["version"] for row in second.shards.to_pylist()] == [
        fs.info(f"{path}/{n}.tar")["ETag"] for n in ("00000", "00001", "00003")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "index", "s3://no-such-bucket/train", "--out", "s3://indexes/x"), "no shard at s3://no-such-bucket/train"),
        (
            ("data", "index", "s3://shards/train", "--out", "s3://no-such-bucket/x"),
            "cannot write an index to s3://no-such-bucket/x: .*bucket does not exist",
        ),
        (("train", "clip-tiny", "--data", "s3://no-such-bucket/index"), "no index at s3://no-such-bucket/index"),
    ],
)
def test_a_missing_bucket_is_one_clear_line(arguments: tuple[str, ...], message: str, shards: str, index: Index) -> None:
    with pytest.raises(DataError, match=message) as caught:
        CliRunner().invoke(mm.app, list(arguments), catch_exceptions=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "command", [("data", "index", "s3://shards/train", "--out", "x"), ("train", "clip-tiny", "--data", "s3://indexes/first")]
)
def test_missing_credentials_are_one_clear_line(command: tuple[str, ...], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    environment |= {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    arguments = [sys.executable, "-c", "import mm; mm.main()", *command, *(("--dry-run",) if command[0] == "train" else ())]
    done = subprocess.run(arguments, env=environment, cwd=Path(mm.__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert "credentials (set AWS_ACCESS_KEY_ID" in done.stderr


def test_a_shard_with_another_etag_stops_the_run(corpus: Path, index: Index, object_store: ObjectStore) -> None:
    folder = f"{bucket('changing')}/train"
    for number in range(3):
        upload(corpus / "train" / f"{number:05d}.tar", f"{folder}/{number:05d}.tar")
    ours = build_index([folder], "s3://indexes/changing")
    assert check_shards([index, ours], shards_per_task=2) == 7
    fs, path = open_store(f"{folder}/00001.tar")
    data = fs.cat_file(path)
    fs.pipe_file(path, data[:-1] + b"x")  # as long as before
    fs.rm_file(f"{path.removesuffix('00001.tar')}00002.tar")
    message = r'shard s3://changing/train/00001.tar \(and 1 more of 7 shards\) was written again .*" → ".*--base'
    with pytest.raises(DataError, match=message) as caught:
        check_shards([index, ours], shards_per_task=2)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.chaos)], ids=["run", "run and resume"])
def test_a_run_from_s3_to_s3(resumed: bool, index: Index, object_store: ObjectStore, tmp_path: Path) -> None:
    """Data, checkpoints, bundle: nothing of a run is on the local disk but what MLflow keeps. Of the store's writes every fifth fails, of
    its reads one in twenty."""
    storage, tower = bucket(f"storage-{resumed}".lower()), "{width: 32, layers: 1, heads: 2}"
    common = ["train", "clip-tiny", "--data", index.url, "--name", "first", "--verify", "--json", "--set=tokenizer.vocab_size=320"]
    common += [f"--set=model.vision={tower}", f"--set=model.text={tower}"]
    common += [f"--set=tracking.uri=sqlite:///{tmp_path}/mlflow.db", "--set=global_batch_size=64", "--set=log_every_steps=1"]
    common += [f"--set=storage={storage}/runs", "--set=checkpoint.every_steps=4", "--set=tracking.system_metrics=false"]

    def train(*more: str) -> dict[str, Any]:
        result = CliRunner().invoke(mm.app, [*common, "--set=steps=4", *more], catch_exceptions=False)
        assert result.exit_code == 0
        return dict(json.loads(result.stdout.splitlines()[-1]))

    object_store.faults(fail=0.05, every_write=5)
    try:
        first = train()
        counts = object_store.counts()
    finally:
        object_store.faults()
    assert counts["failed_writes"] > 2
    assert first["bundle"] == f"{storage}/runs/first/bundle"
    fs, path = open_store(first["bundle"])
    assert fs.exists(f"{path}/model.safetensors")
    fs.get(path, str(tmp_path / "bundle"), recursive=True)
    load_bundle(tmp_path / "bundle")  # whole, by its digests
    assert first["checkpoint"] == f"{storage}/runs/first/checkpoint_00000004"
    assert first["samples_per_s"] > 0
    if resumed:
        again = train("--resume")
        assert (again["run_id"], again["checkpoint"]) == (first["run_id"], first["checkpoint"])
        assert again["samples_per_s"] == 0  # the last checkpoint was found, so there was no step left to take
    (replaced,) = Path(tmp_path).rglob("replaced.json")
    assert json.loads(replaced.read_text()) == []


def test_a_dry_run_counts_what_the_store_counts(index: Index, object_store: ObjectStore) -> None:
    split(index, heldout=0.7, seed=1, names=("few", "many"))
    source = Source(index=index.url, ledgers=("few",))
    run, _ = resolve_run("clip-tiny", ["steps=3", "global_batch_size=64", "data.gap_bytes=0", "stream.block_bytes=1"])
    data = RunData.open([source])
    cost = read_cost(data, run)
    reader, plan, (kept,) = IndexReader(index, gap_bytes=0), data.plan(run), data.kept
    reader.spans(np.arange(1))  # the index's own files are read now, and not counted
    object_store.faults()
    for first in range(0, 3 * 64, run.data.chunk):  # a block is a chunk
        places = plan.locate(np.arange(first, first + run.data.chunk, dtype=np.uint64))
        reader.read(kept.at(places.kept, places.epochs, run.seed))
    counts = object_store.counts()
    assert cost is not None
    assert (cost.requests, cost.bytes_read) == (counts["requests"], counts["bytes"])
    assert cost.amplification == 1
    report = describe(run, [source], prices=Prices(per_1000_requests=2, per_gb=5), samples_per_s=10)
    assert report["requests_per_s"] == pytest.approx(10 * cost.requests / 192, rel=1e-3)
    assert report["cost_usd"] == pytest.approx(cost.requests * 2 / 1000 + cost.bytes_read * 5e-9, abs=1e-3)
    wide = read_cost(data, run.model_copy(update={"data": run.data.model_copy(update={"gap_bytes": 1 << 20})}))
    assert wide is not None
    assert wide.requests < cost.requests
    assert wide.amplification > 1.5


def test_a_dry_run_names_the_command_that_writes_less_to_read(index: Index) -> None:
    split(index, heldout=0.9, seed=2, names=("tenth", "rest"))
    arguments = ["train", "clip-tiny", "--data", index.url, "--ledger", "tenth", "--set=steps=3", "--set=global_batch_size=16", "--dry-run"]
    done = CliRunner().invoke(mm.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    command = f"mm data export {index.url}#tenth --out SHARDS"
    assert f"{command}, then mm data index SHARDS --out INDEX" in done.output
    planned = CliRunner().invoke(mm.app, [*command.split()[1:], "--dry-run"], catch_exceptions=False)
    assert "would write" in planned.output


def test_an_export_to_a_store_is_that_of_the_local_disk(index: Index, object_store: ObjectStore, tmp_path: Path) -> None:
    object_store.faults()
    target, plan = f"{bucket('exports')}/kept", Export.of(Source(index=index.url), max_samples=120, shuffle=True)
    summary = plan.write(target)
    local = plan.write(str(tmp_path / "out"))
    fs, path = open_store(target)
    assert {name.rpartition("/")[2] for name in fs.find(path)} == {"00000.tar", "00001.tar", "00002.tar", "export.json", "sizes.json"}
    for name in ("00000.tar", "00001.tar", "00002.tar", "export.json"):
        assert fs.cat_file(f"{path}/{name}") == (tmp_path / "out" / name).read_bytes()
    assert plan.write(target) == summary == local
    listed = f"{target}/uids/kept.parquet"
    export_uids(index, plan.order, listed, parquet=True)
    assert import_uids(index, listed, "listed").ledger.kept == index.summary.samples
    with pytest.raises(DataError, match=r"cannot write shards to s3://no-such-bucket/x: .*bucket does not exist") as caught:
        plan.write("s3://no-such-bucket/x")
    assert "\n" not in str(caught.value)


def test_a_dry_run_of_local_data_costs_no_requests(corpus: Path, tmp_path: Path) -> None:
    local = build_index([str(corpus / "train")], str(tmp_path / "index"))
    run, _ = resolve_run("clip-tiny", ["steps=3"])
    assert read_cost(RunData.open([Source(index=local.url)]), run) is None
