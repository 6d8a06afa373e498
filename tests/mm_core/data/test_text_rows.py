"""Texts in JSONL and Parquet files are samples like any: indexed, addressed, checked, and read again as they were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.scan import scan_shard
from mm_core.data.tar import Hole
from mm_core.data.text_rows import TableReader, lines, row_of_span, table_rows
from mm_core.errors import DataError

TEXTS = ["a red circle", "ein grüner Kreis ", "a blue\nsquare", "赤い丸"]


def jsonl(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    rows = [{"text": TEXTS[0]}, {"caption": TEXTS[1], "uid": "own"}, {"text": TEXTS[2]}, {"text": TEXTS[3]}, {"other": 1}, {"text": " "}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines[:2], "", *lines[2:], "no json"]), encoding="utf-8")
    return path


def table(folder: Path, group: int = 2) -> Path:
    path = folder / "texts.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": list(range(5))}), path, row_group_size=group)
    return path


def scanned(path: Path) -> pa.Table:
    return pa.concat_tables([batch.table for batch in scan_shard(str(path), 0, ("text",))])


def test_lines_are_indexed_with_their_bytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path)
    rows = scanned(path)
    good = rows.filter(pa.compute.is_null(rows["reason"]))
    assert [captions[0] for captions in good["captions"].to_pylist()] == [text.strip() for text in TEXTS]
    assert good["uid"].to_pylist()[1] == "own"
    assert len(set(good["uid"].to_pylist())) == 4
    assert rows["reason"].drop_null().to_pylist() == [Reason.NO_TEXT, Reason.NO_TEXT, Reason.BAD_JSON]
    data = path.read_bytes()
    for row, text in zip(good.to_pylist(), TEXTS, strict=True):
        line = json.loads(data[row["start"] : row["start"] + row["span"]])
        assert (line.get("text") or line.get("caption")) == text


def test_rows_are_indexed_with_their_numbers(tmp_path: Path) -> None:
    path = table(tmp_path)
    rows = scanned(path)
    assert rows["start"].to_pylist() == [0, 1, 2, 3, 4]
    assert [found and found[0] for found in rows["captions"].to_pylist()[:4]] == [text.strip() for text in TEXTS]
    assert rows["reason"].to_pylist() == [None] * 4 + [Reason.NO_TEXT]
    reader = TableReader()
    numbers = [3, 0, 4, 1]
    read = reader.read([(str(path), number) for number in numbers])
    assert [json.loads(data)["text"] for data in read if isinstance(data, bytes)] == [TEXTS[3], TEXTS[0], None, TEXTS[1]]
    whole = list(table_rows(str(path)))
    for number, data in zip(numbers, read, strict=True):
        assert isinstance(data, bytes)
        assert row_of_span(data, "t", check=whole[number].check).key == whole[number].key


def test_a_text_that_changed_is_noticed(tmp_path: Path) -> None:
    path = table(tmp_path)
    check = next(iter(table_rows(str(path)))).check
    with pytest.raises(SampleProblem, match="not the one that was indexed"):
        row_of_span(b'{"text": "another"}', "t", check=check)
    (problem,) = TableReader().read([(str(path), 9)])
    assert isinstance(problem, SampleProblem)
    assert problem.reason is Reason.READ_FAILED


def test_groups_of_rows_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = table(tmp_path), []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, n, **k: reads.append(n) or original(self, n, **k))
    TableReader().read([(str(path), number) for number in (0, 1, 2, 3, 0)])
    assert reads == [0, 1]


def test_a_table_without_texts_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match="none of the columns captions, caption, text"):
        scanned(tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cannot read .*broken\.parquet"):
        scanned(tmp_path / "broken.parquet")


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    """What follows it is found at its bytes."""
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * (9 << 20) + b'"}'
    path.write_bytes(b'{"text": "first"}\n' + long + b'\n{"text": "second"}\n{"text": "third"}')
    sizes = []

    class Watched:
        def __init__(self) -> None:
            self._file = path.open("rb")

        def read(self, size: int, /) -> bytes:
            sizes.append(size)
            return self._file.read(size)

    first, hole, *rest = lines(Watched())
    assert isinstance(hole, Hole)
    assert (hole.reason, hole.start, hole.detail) == (Reason.MEMBER_TOO_LARGE, 18, f"a line of {len(long):,} bytes")
    data = path.read_bytes()
    assert [data[row.first : row.last] for row in (first, *rest)] == [b'{"text": "first"}', b'{"text": "second"}', b'{"text": "third"}']
    assert max(sizes) <= 1 << 20
    path.write_bytes(long)
    (hole,) = lines(Watched())
    assert isinstance(hole, Hole)


def test_many_lines_over_many_reads(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    texts = [f"text {n} " + "x" * int(length) for n, length in enumerate(np.random.default_rng(0).integers(0, 3000, 2000))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = scanned(path)
    assert [captions[0] for captions in rows["captions"].to_pylist()] == [text.strip() for text in texts]
