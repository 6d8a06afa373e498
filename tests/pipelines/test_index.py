from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.data.problems import SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from mm_core.data.scan import SAMPLE_SCHEMA, scan_shard
from mm_core.data.split import split
from mm_core.data.synth.corpus import SynthConfig, write_corpus
from mm_core.errors import ConfigError, DataError
from pipelines.index import build_index
from pipelines.shards import expand_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("index") / "index"))


@pytest.fixture
def picture(corpus: Path) -> bytes:
    with tarfile.open(corpus / "train" / "00000.tar") as tar:
        member = tar.extractfile("00000000.jpg")
        assert member is not None
        return member.read()


def test_every_sample_is_found_by_its_ordinal(index: Index, corpus: Path) -> None:
    assert (index.summary.samples, index.summary.shards, index.summary.bad) == (330, 4, {})
    truth = {}
    for path in sorted((corpus / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            truth |= {m.name: file.read() for m in tar if (file := tar.extractfile(m))}
    ordinals = np.arange(330, dtype=np.uint64)[::-1].copy()
    for ordinal, sample in zip(ordinals, IndexReader(index).read(ordinals), strict=True):
        assert isinstance(sample, Sample)
        assert sample.image == truth[f"{ordinal:08d}.jpg"]
        assert sample.uid == json.loads(truth[f"{ordinal:08d}.json"])["uid"]
        assert sample.captions[0].encode() == truth[f"{ordinal:08d}.txt"]


def test_the_table_says_what_the_samples_hold(index: Index) -> None:
    rows = [
        row for batch in index.samples(["shard", "row", "uid", "width", "image_format", "captions", "reason"]) for row in batch.to_pylist()
    ]
    assert [(r["shard"], r["row"]) for r in rows] == sorted((r["shard"], r["row"]) for r in rows)
    assert len({r["uid"] for r in rows}) == 330
    assert {(r["width"], r["image_format"], r["reason"]) for r in rows} == {(48, "jpeg", None)}
    assert all(r["captions"] for r in rows)


def test_locators_are_small_and_open_with_numpy_alone(index: Index) -> None:
    locators = np.load(f"{index.url}/locators.npy", mmap_mode="r")
    assert locators.dtype.itemsize == 24
    assert len(locators) == 330


def test_the_same_shards_have_the_same_fingerprint_wherever_they_lie(index: Index, tmp_path: Path) -> None:
    write_corpus(tmp_path / "again", SynthConfig(samples=330, samples_per_shard=100, image_size=48, heldout_samples=0, zeroshot_samples=0))
    again = build_index([str(tmp_path / "again" / "train")], str(tmp_path / "index"))
    assert again.summary.fingerprint == index.summary.fingerprint


def test_bad_samples_are_rows_with_a_reason(picture: bytes, tmp_path: Path) -> None:
    good = {f"g{i}.{suffix}": data for i in range(8) for suffix, data in (("jpg", picture), ("txt", b"fine"))}
    bad = {"a.txt": b"text only", "b.jpg": picture, "c.jpg": b"no picture", "c.txt": b"t", "d.jpg": b"", "d.txt": b"t", "e.mp4.gz": b"z"}
    shard = write_tar(tmp_path / "s.tar", good | bad)
    index = build_index([str(shard)], str(tmp_path / "index"), max_bad_fraction=0.5)
    assert index.summary.samples == 8
    assert index.summary.bad == {"no_image": 1, "no_text": 1, "not_an_image": 1, "empty_image": 1, "unsupported_member": 1}
    assert len(compile_kept(index)) == 8
    table = pq.read_table(f"{index.url}/samples")
    assert sum(reason is not None for reason in table["reason"].to_pylist()) == 5


def test_too_many_bad_samples_stop_the_job(picture: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.txt": b"text only", "b.jpg": picture, "b.txt": b"t"})
    with pytest.raises(DataError, match=r"1 of 2 samples \(50%\) cannot be used.*no_image 1"):
        build_index([str(shard)], str(tmp_path / "index"))
    with pytest.raises(DataError, match="no index at"):
        Index.open(str(tmp_path / "index"))
    assert build_index([str(shard)], str(tmp_path / "index"), max_bad_fraction=0.5).summary.samples == 1


def test_a_truncated_shard_keeps_what_is_whole(corpus: Path, tmp_path: Path) -> None:
    data = (corpus / "train" / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    summary = build_index([str(tmp_path / "cut.tar")], str(tmp_path / "index")).summary
    assert 40 < summary.samples < 60
    assert sum(summary.bad.values()) in (1, 2)
    assert "truncated" in summary.bad
    ((url, start),) = summary.cut.items()
    assert url == str(tmp_path / "cut.tar")
    assert start <= len(data) // 2 < start + 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"is empty \(0 bytes\)"), (b"\x1f\x8b" + bytes(600), "compressed with gzip"), (b"no tar" * 500, "no usable sample")],
)
def test_what_is_no_shard_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_index([str(tmp_path / "x.tar")], str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_what_was_read_before_an_unreadable_shard_is_kept_for_the_next_call(corpus: Path, tmp_path: Path) -> None:
    for number in range(40):  # more than one part, on the session's four processors
        shutil.copy(corpus / "train" / "00003.tar", tmp_path / f"{number:02d}.tar")
    (tmp_path / "39.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"39\.tar is empty.*what was read of other shards is kept in .*index, and the same"):
        build_index([f"{tmp_path}/*.tar"], str(tmp_path / "index"))
    shutil.copy(corpus / "train" / "00003.tar", tmp_path / "39.tar")
    assert build_index([f"{tmp_path}/*.tar"], str(tmp_path / "index")).summary.shards == 40


def test_missing_shards_and_taken_folders_are_refused(index: Index, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shard at"):
        expand_shards([str(tmp_path / "nothing" / "*.tar")])
    with pytest.raises(ConfigError, match="is an index already"):
        build_index([str(corpus / "train")], index.url)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"holds other things \(precious\.txt\)"):
        build_index([str(corpus / "train")], str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "precious.txt").read_text() == "keep"
    with pytest.raises(DataError, match="mm data index"):
        Index.open(str(tmp_path / "nothing"))


def test_a_range_with_a_hole_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"2 of the 6 shards that .* names are not there, .*00004\.tar first"):
        expand_shards([f"{corpus}/train/{{00000..00005}}.tar"])


def test_a_name_like_a_signature_is_no_compressed_shard(picture: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"BZh4xQ.jpg": picture, "BZh4xQ.txt": b"fine"})
    assert build_index([str(shard)], str(tmp_path / "index")).summary.samples == 1


def test_the_fingerprint_says_what_is_usable(picture: bytes, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "s.tar", {"a.jpg": picture, "a.txt": b"fine"})
    first, second = (
        build_index([str(shard)], str(tmp_path / f"{bound}"), max_pixels=bound, need=("text",), max_bad_fraction=1).summary
        for bound in (10**6, 10**7)
    )
    assert first.fingerprint != second.fingerprint


def test_shards_are_named_in_many_ways(corpus: Path) -> None:
    folder = corpus / "train"
    everything = [str(folder / f"{i:05d}.tar") for i in range(4)]
    for patterns in ([str(folder)], [str(folder / "*.tar")], [str(folder / "{00000..00003}.tar")], [*everything, *everything]):
        assert expand_shards(patterns) == everything


def test_tables_beside_tars_are_not_samples(corpus: Path, tmp_path: Path) -> None:
    """img2dataset writes one of each shard's metadata."""
    shard = min((corpus / "train").glob("*.tar"))
    (tmp_path / "data").mkdir()
    shutil.copy(shard, tmp_path / "data" / "00000.tar")
    pq.write_table(pa.table({"caption": ["a cat"], "url": ["x"]}), tmp_path / "data" / "00000.parquet")
    assert expand_shards([str(tmp_path / "data")]) == [str(tmp_path / "data" / "00000.tar")]
    (tmp_path / "data" / "00000.tar").unlink()
    assert expand_shards([str(tmp_path / "data")]) == [str(tmp_path / "data" / "00000.parquet")]


def test_any_fsspec_store(corpus: Path, tmp_path: Path) -> None:
    """The memory store stands for a remote one: other code paths, no local files."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shards/0.tar", (corpus / "train" / "00000.tar").read_bytes())
    (read,) = scan_shard("memory://shards/0.tar", 0, ("image", "text"))
    (local,) = scan_shard(str(corpus / "train" / "00000.tar"), 0, ("image", "text"))
    np.testing.assert_array_equal(read.locators, local.locators)
    assert read.table == local.table
    assert expand_shards(["memory://shards/*.tar"]) == ["memory:///shards/0.tar"]


def test_a_changed_byte_is_noticed(corpus: Path, tmp_path: Path) -> None:
    data = (corpus / "train" / "00000.tar").read_bytes()
    shard = tmp_path / "s.tar"
    shard.write_bytes(data)
    index = build_index([str(shard)], str(tmp_path / "index"))
    shard.write_bytes(bytes(512) + data[512:])
    first, second = IndexReader(index).read(np.asarray([0, 1], dtype=np.uint64))
    assert isinstance(first, SampleProblem)
    assert first.reason == "changed"
    assert isinstance(second, Sample)


def test_a_split_divides_without_overlap_and_is_repeatable(index: Index) -> None:
    ours, theirs = split(index, heldout=0.2, seed=1)
    train, held = compile_kept(index, ["train"]), compile_kept(index, ["heldout"])
    assert sorted([*train.ordinals, *held.ordinals]) == list(range(330))
    assert 30 < len(held) < 110
    assert split(index, heldout=0.2, seed=1) == (ours, theirs)
    assert len(compile_kept(index, ["train", "heldout"])) == 0
    with pytest.raises(DataError, match="has no ledger 'trian'; it has: heldout, train"):
        compile_kept(index, ["trian"])


def swap_bytes_unnoticed(shard: Path) -> None:
    """Other bytes under the same size and time: whoever reads the shard now finds no sample."""
    state = shard.stat()
    shard.write_bytes(b"\x01" * state.st_size)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.fixture
def shards(corpus: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    shutil.copytree(corpus / "train", folder)
    return folder


def rows_of(index: Index) -> list[dict[str, object]]:
    return [row for batch in index.samples(SAMPLE_SCHEMA.names) for row in batch.to_pylist()]


def test_from_a_base_only_new_and_changed_shards_are_read(shards: Path, corpus: Path, tmp_path: Path) -> None:
    old = build_index([str(shards)], str(tmp_path / "old"))
    before = {path: path.read_bytes() for path in Path(old.url).rglob("*") if path.is_file()}
    shutil.copy(corpus / "heldout" / "00000.tar", shards / "00000a.tar")  # new, and in the middle: the numbers of the others move
    write_tar(shards / "00002.tar", {"x.jpg": (corpus / "train" / "00000.tar").read_bytes()[512:1024], "x.txt": b"t"})  # changed
    (shards / "00003.tar").unlink()
    expected = build_index([str(shards)], str(tmp_path / "expected"), max_bad_fraction=0.5)
    for unchanged in ("00000.tar", "00001.tar"):
        swap_bytes_unnoticed(shards / unchanged)
    new = build_index([str(shards)], str(tmp_path / "new"), base=old.url, max_bad_fraction=0.5)
    assert new.summary == expected.summary
    assert rows_of(new) == rows_of(expected)
    np.testing.assert_array_equal(new.locators, expected.locators)
    assert {path: path.read_bytes() for path in Path(old.url).rglob("*") if path.is_file()} == before
    third = build_index([str(shards)], str(tmp_path / "third"), base=new.url, max_bad_fraction=0.5)
    assert rows_of(third) == rows_of(expected)


def test_a_base_of_other_settings_is_refused(index: Index, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was made for image-text up to 25,000,000 pixels, this one is for image up to"):
        build_index([str(corpus / "train")], str(tmp_path / "index"), base=index.url, need=("image",))
    assert not (tmp_path / "index").exists()


def test_after_a_stop_the_same_call_goes_on(index: Index, shards: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "index", shards / "00003.tar"
    good = bad.read_bytes()
    bad.write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match="compressed with gzip"):
        build_index([str(shards)], str(out))
    with pytest.raises(DataError, match="no index at"):
        Index.open(str(out))
    bad.write_bytes(good)
    resumed = build_index([str(shards)], str(out))
    assert resumed.summary == index.summary
    np.testing.assert_array_equal(resumed.locators, index.locators)
    assert {path.name for path in out.iterdir()} == {"index.json", "shards.parquet", "samples", "locators.npy", "digests.npy"}


def test_a_stale_or_half_written_part_is_read_again(index: Index, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    with pytest.raises(DataError, match="cannot be used"):
        build_index([str(shards)], str(out), need=("image", "text"), max_bad_fraction=-1)
    notes = sorted((out / "_parts").glob("*.json"))
    assert len(notes) == 4
    notes[0].write_text(notes[0].read_text()[:100])
    os.utime(shards / "00001.tar", (1, 1))
    swap_bytes_unnoticed(shards / "00002.tar")
    resumed = build_index([str(shards)], str(out))
    assert resumed.summary == index.summary
    assert len(list((out / "samples").iterdir())) == 4


@pytest.mark.slow
def test_a_killed_command_is_continued(shards: Path, tmp_path: Path) -> None:
    """SIGKILL to the command and all it started, at the moment a part is done; then the same command again."""
    many, out = tmp_path / "many", tmp_path / "index"
    many.mkdir()
    for i in range(60):
        os.link(shards / f"{i % 4:05d}.tar", many / f"{i:05d}.tar")
    command = [sys.executable, "-m", "mm", "data", "index", str(many), "--out", str(out), "--json"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("_parts/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = list(out.glob("_parts/*.json"))
    assert done
    with pytest.raises(DataError, match="no index at"):
        Index.open(str(out))
    finished = {note.name: note.stat().st_mtime_ns for note in done}
    seen: dict[str, int] = {}

    def watch(shards_done: int, note: str) -> None:
        seen.update({note.name: note.stat().st_mtime_ns for note in out.glob("_parts/*.json")})

    resumed = build_index([str(many)], str(out), on_progress=watch)
    assert {name: seen[name] for name in finished} == finished
    assert resumed.summary.shards == 60
    assert resumed.summary.fingerprint == build_index([str(many)], str(tmp_path / "whole")).summary.fingerprint


def test_filters_can_skip_by_statistics(index: Index) -> None:
    metadata = pq.ParquetFile(f"{index.url}/samples/{index.shards['file'][0]}").metadata
    columns = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    for group in range(metadata.num_row_groups):
        for name in ("shard", "row", "width", "height", "caption_characters", "image_format"):
            statistics = metadata.row_group(group).column(columns[name]).statistics
            assert statistics.has_min_max, name
        assert metadata.row_group(group).column(columns["width"]).statistics.min == 48
    assert metadata.row_group(0).sorting_columns


class FlakyStore(MemoryFileSystem):  # type: ignore[misc]
    """A store whose connection breaks at every 37th read."""

    protocol = "flaky"
    reads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").lstrip("/")

    def _open(self, path: str, mode: str = "rb", **options: object) -> io.BytesIO:
        file: io.BytesIO = super()._open(path, mode, **options)
        if "w" in mode:
            return file
        return _FlakyFile(file.getvalue())


class _FlakyFile(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        FlakyStore.reads += 1
        if FlakyStore.reads % 37 == 0:
            super().read(100)  # as a broken connection does: the position has moved when the error comes
            raise OSError("connection reset")
        return super().read(size)


def test_a_shard_is_reopened_where_the_store_failed(corpus: Path) -> None:
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    store = fsspec.filesystem("flaky")
    path = corpus / "train" / "00000.tar"
    store.pipe_file("/0.tar", path.read_bytes())
    (read,) = scan_shard("flaky://0.tar", 0, ("image", "text"))
    (local,) = scan_shard(str(path), 0, ("image", "text"))
    assert FlakyStore.reads > 300
    assert read.table == local.table


def test_folders_that_are_not_an_index_under_way_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    """Not even one that has a part's name: shards that lie in OUT/samples are the user's."""
    shard = tmp_path / "data" / "samples" / "00000.tar"
    shard.parent.mkdir(parents=True)
    shutil.copy(corpus / "train" / "00000.tar", shard)
    with pytest.raises(ConfigError, match="exists and holds other things"):
        build_index([str(shard.parent)], str(tmp_path / "data"))
    assert shard.exists()


@pytest.mark.parametrize("address", ["pipe:touch {done}", "pipe://touch {done}", "| touch {done}", "$(touch {done})"])
def test_an_address_is_never_a_command(tmp_path: Path, address: str) -> None:
    done = tmp_path / "done"
    with pytest.raises(DataError):
        expand_shards([address.format(done=done)])
    assert not done.exists()
