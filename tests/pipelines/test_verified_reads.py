"""Reads that disagree with the index: in the headers, which is always looked at, and in the content, which `--verify` looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mm_core.data.index import Index
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from mm_core.errors import DataError
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")
ALL = np.arange(40, dtype=np.uint64)
NEVER = 1 << 60


class Rotting(MemoryFileSystem):  # type: ignore[misc]
    """A store that turns a bit in every fifth range it sends, or in each that covers the byte `rotten`."""

    protocol = "rotting"
    reads, every, rotten = 0, 5, -1

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("rotting://").lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        data = bytearray(super().cat_file(path, start, end, **options))
        Rotting.reads += 1
        if start is not None and end is not None:
            if Rotting.reads % Rotting.every == 0:
                data[len(data) // 2] ^= 1
            if start <= Rotting.rotten < end:
                data[Rotting.rotten - start] ^= 1
        return bytes(data)


@pytest.fixture
def index(corpus: Path, tmp_path: Path) -> Iterator[Index]:
    """Of a shard that lay on the disk when it was indexed, and lies in the store now."""
    shard = corpus / "train" / "00000.tar"
    fsspec.register_implementation("rotting", Rotting, clobber=True)
    fsspec.filesystem("rotting").pipe_file("/00000.tar", shard.read_bytes())
    index = build_index([str(shard)], str(tmp_path / "index"))
    index.__dict__["shard_urls"] = ["rotting://00000.tar"]
    Rotting.every, Rotting.rotten = 5, -1
    yield index
    Rotting.every = NEVER


def images(found: list[Sample | SampleProblem]) -> list[bytes | None]:
    return [one.image if isinstance(one, Sample) else None for one in found]


def test_content_that_was_damaged_on_the_way_is_read_again(index: Index, corpus: Path) -> None:
    local = replace(index)
    local.__dict__["shard_urls"] = [str(corpus / "train" / "00000.tar")]
    truth = images(IndexReader(local).read(ALL[::2]))
    assert images(IndexReader(index, gap_bytes=0).read(ALL[::2])) != truth
    assert images(IndexReader(index, gap_bytes=0, verify=True).read(ALL[::2])) == truth


def test_content_that_stays_another_is_quarantined_under_its_reason(index: Index) -> None:
    place = index.locators[6]
    Rotting.every, Rotting.rotten = NEVER, int(place["start"] + place["span"] // 2)
    reader = IndexReader(index, verify=True, gap_bytes=0)
    found = reader.read(ALL)
    (number,) = [n for n, one in enumerate(found) if isinstance(one, SampleProblem)]
    assert (number, found[6].reason) == (6, Reason.CHANGED)
    before = Rotting.reads
    assert reader.read(ALL[6:7])[0] is found[6]
    assert Rotting.reads == before
    Rotting.rotten = -1
    assert isinstance(IndexReader(index, verify=True).read(ALL[6:7])[0], Sample)  # of this process alone


def test_an_index_without_digests_says_so(index: Index) -> None:
    Path(index.url, "digests.npy").unlink()
    with pytest.raises(DataError, match=r"no digests.npy, which --verify and mm data export compare with: index the shards again"):
        IndexReader(index, verify=True)


def test_digests_are_those_of_the_table(index: Index) -> None:
    (batch,) = index.samples(["digest"])
    assert [bytes(digest).hex() for digest in index.digests] == batch["digest"].to_pylist()
