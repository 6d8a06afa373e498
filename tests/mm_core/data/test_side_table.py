from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_core.data.columns import vectors_column, vectors_of
from mm_core.data.side_table import SideTable, check_name
from mm_core.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> SideTable:
    table = SideTable(str(tmp_path_factory.mktemp("side") / "values"), 23, chunk_rows=5)
    assert table.held() == set()
    for chunk in (4, 0, 3, 1, 2):
        first, last = table.bounds(chunk)
        table.write(chunk, pa.table({"row": np.arange(first, last), "twice": 2 * np.arange(first, last)}))
    return table


@given(st.integers(0, 23), st.integers(0, 23))
def test_rows_between_are_those_of_whichever_chunks_hold_them(table: SideTable, one: int, other: int) -> None:
    first, last = sorted((one, other))
    if first < 23:
        assert table.between(first, last, ["row"])["row"].to_pylist() == list(range(first, last))


def test_chunks_that_are_there_are_known_and_one_that_lacks_is_named(table: SideTable) -> None:
    assert table.held() == set(range(5))
    Path(table.url, "00003.parquet").rename(Path(table.url, "00003.parquet.tmp"))
    assert table.held() == {0, 1, 2, 4}
    with pytest.raises(DataError, match=r"00003\.parquet.*make it again"):
        table.between(14, 16)
    Path(table.url, "00003.parquet.tmp").rename(Path(table.url, "00003.parquet"))


def test_vectors_come_back_and_those_that_lack_are_null(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    present = np.array([True, False, True, True])
    table = SideTable(str(tmp_path / "values"), 4)
    table.write(0, pa.table({"image": vectors_column(values, present)}))
    column = table.read(0)["image"]
    assert column.type == pa.binary(6)
    assert column.is_valid().to_pylist() == present.tolist()
    np.testing.assert_array_equal(vectors_of(column, np.float16)[present], values[present])
    np.testing.assert_array_equal(vectors_of(column.slice(2, 2), np.float16), values[2:])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a,b", "a#b", "a b", "x" * 101])
def test_names_that_are_no_folders(name: str) -> None:
    assert check_name("clip-b32.v2_x") == "clip-b32.v2_x"
    with pytest.raises(ConfigError, match="cannot be a name here"):
        check_name(name)
