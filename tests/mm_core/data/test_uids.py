from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_core.data.uids import SUBSET, UidList, subset_array, uid_keys
from mm_core.errors import DataError

HEX = st.binary(min_size=16, max_size=16).map(bytes.hex)
ANY = HEX | HEX.map(str.upper) | st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(["g" * 32, "0" * 32, "00" * 15 + "0"])


def pairs(uids: list[str]) -> np.ndarray:
    """As DataComp's own programs make them."""
    return np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))


@given(st.lists(HEX, min_size=1))
def test_hexadecimal_uids_are_sorted_as_datacomp_sorts_them(uids: list[str]) -> None:
    keys, exact = uid_keys(pa.array(uids))
    expected = pairs(uids)
    expected.sort()
    assert exact.all()
    assert subset_array(keys).dtype == SUBSET == np.dtype("u8,u8")
    assert subset_array(keys).tolist() == expected.tolist()


@given(st.lists(ANY, min_size=1), st.lists(ANY))
def test_uids_are_found_as_in_a_dictionary(listed: list[str], asked: list[str]) -> None:
    def value(uid: str) -> str:  # hexadecimal uids are their values, so their case says nothing
        return uid.lower() if len(uid) == 32 and set(uid.lower()) <= set("0123456789abcdef") else uid

    uids = UidList.of(uid_keys(pa.array(listed))[0])
    counts = Counter(map(value, listed))
    assert len(uids.keys) == len(counts)
    assert [uid_keys(pa.array([uid]))[0][0] for uid in asked] == uid_keys(pa.array(asked, pa.string()))[0].tolist()
    places = uids.find(uid_keys(pa.chunked_array([asked[:2], asked[2:]], pa.string()))[0])
    assert [0 if place < 0 else uids.times[place] for place in places] == [counts[value(uid)] for uid in asked]


def test_every_kind_of_file_lists_the_same(tmp_path: Path) -> None:
    listed = [f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}{n:016x}" for n in range(1000)]
    np.save(tmp_path / "a.npy", np.sort(pairs(listed)))
    (tmp_path / "a.txt").write_text("\r\n".join(reversed(listed)) + "\n\n")
    pq.write_table(pa.table({"url": ["x"] * 1000, "uid": listed}), tmp_path / "a.parquet")
    (tmp_path / "named-anything").write_bytes((tmp_path / "a.npy").read_bytes())
    found = [UidList.read(str(tmp_path / name)) for name in ("a.npy", "a.txt", "a.parquet", "named-anything")]
    assert len({each.fingerprint for each in found}) == 1
    assert found[0].keys.tolist() == uid_keys(pa.array(sorted(listed)))[0].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.arange(4), r"it holds int64 of shape \(4,\), a subset file one column of pairs"),
        (np.array([{}], dtype=object), "cannot read uids from .*allow_pickle"),
        (pa.table({"url": ["x"], "text": ["y"]}), "no column `uid`, but url, text"),
        (b"", "Empty CSV file"),
        (b"\n\n", "lists no uid"),
        (b"\xff\xfe\x00", "cannot read uids from"),
        (b"PAR1 and no more", "cannot read uids from"),
        (None, "cannot read uids from .*No such file"),
    ],
)
def test_a_file_without_uids_is_one_clear_line(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    match content:
        case np.ndarray():
            with path.open("wb") as file:
                np.save(file, content)
        case pa.Table():
            pq.write_table(content, path)
        case bytes():
            path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        UidList.read(str(path))
    assert "\n" not in str(caught.value)
