from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.sample import Group, group_of_span, groups, read_group, split_name
from mm_core.data.tar import BLOCK, Hole, Member, walk

MakeTar = Callable[..., bytes]


def make_tar(files: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def end_of_members(data: bytes) -> int:
    """Where tar's end mark begins: `tarfile` pads to 20 blocks."""
    return -(-len(data.rstrip(b"\0")) // BLOCK) * BLOCK


def walked(data: bytes, *, whole: bool = True) -> list[Member | Hole]:
    return list(walk(io.BytesIO(data), max_member_bytes=1 << 20, whole=whole))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_reads(tar_format: int) -> None:
    files = {"a.txt": b"x", "deep/" * 18 + "b.jpg": b"y" * 1000, "ü-é.json": b"{}", "empty.txt": b""}
    if tar_format != tarfile.USTAR_FORMAT:
        files["n" * 300 + ".txt"] = b"long"
    data = make_tar(files, tar_format)
    members = walked(data)
    assert all(isinstance(m, Member) for m in members)
    assert {m.name: m.data for m in members if isinstance(m, Member)} == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [m.offset for m in members if isinstance(m, Member)] == [m.offset_data for m in tar]


def test_a_cut_at_any_place_is_reported_and_nothing_before_it_is_lost() -> None:
    data = make_tar({f"{i}.txt": bytes([i]) * 700 for i in range(4)})
    cuts = range(BLOCK, end_of_members(data) + 1, 256)
    assert len(cuts) > 20
    for cut in cuts:
        found = walked(data[:cut])
        whole = [m for m in found if isinstance(m, Member)]
        assert [m.data for m in whole] == [bytes([i]) * 700 for i in range(len(whole))]
        assert [h.reason for h in found if isinstance(h, Hole)] == [Reason.TRUNCATED], cut
        assert len(whole) >= cut // (3 * BLOCK) - 1


def test_a_zeroed_header_costs_one_member() -> None:
    data = bytearray(make_tar({f"{i}.txt": b"z" * 100 for i in range(5)}))
    data[2 * 2 * BLOCK : 2 * 2 * BLOCK + BLOCK] = bytes(BLOCK)
    found = walked(bytes(data))
    assert [m.name for m in found if isinstance(m, Member)] == ["0.txt", "1.txt", "3.txt", "4.txt"]
    assert [h.reason for h in found if isinstance(h, Hole)] == [Reason.BAD_HEADER]


def test_links_and_devices_are_counted_and_directories_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "../../etc/passwd"
            tar.addfile(entry)
    found = walked(buffer.getvalue())
    assert [h.reason for h in found if isinstance(h, Hole)] == [Reason.UNSUPPORTED_MEMBER] * 3
    assert len(found) == 3


def test_large_members_are_passed_over_without_being_held() -> None:
    data = make_tar({"big.jpg": bytes(3 << 20), "b.txt": b"t"})
    big, small = walked(data)
    assert isinstance(big, Member)
    assert big.data is None
    assert isinstance(small, Member)
    assert small.data == b"t"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/d.JPG", ("a/b.c/d", "jpg")),
        ("img.1.jpg", ("img.1", "jpg")),
        ("noext", ("noext", "")),
        (".hidden", (".hidden", "")),
        ("../x.png", ("../x", "png")),
    ],
)
def test_names_split_at_the_last_dot(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_grouping_keeps_doubles_apart_and_any_order_together() -> None:
    data = make_tar({"a.txt": b"ta", "a.jpg": b"ia", "a.json": b"{}", "b.jpg": b"ib"})
    data = data[: end_of_members(data)] + make_tar({"b.jpg": b"again", "b.txt": b"tb"})
    found = [g for g in groups(iter(walked(data))) if isinstance(g, Group)]
    assert [(g.key, sorted(g.members), g.occurrence) for g in found] == [
        ("a", ["jpg", "json", "txt"], 0),
        ("b", ["jpg"], 0),
        ("b", ["jpg", "txt"], 1),
    ]


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        ({"a.jpg": b"i", "a.txt": b" hello \n"}, ["hello"]),
        ({"a.jpg": b"i", "a.json": b'{"captions": ["one", " ", "two"]}', "a.txt": b"one"}, ["one", "two"]),
        ({"a.jpg": b"i", "a.json": b'{"caption": "web"}'}, ["web"]),
        ({"a.jpg": b"i", "a.json": b'{"text": 3}'}, []),
        ({"a.jpg": b"i", "a.txt": b"  "}, []),
    ],
)
def test_captions(files: dict[str, bytes], captions: list[str]) -> None:
    (group,) = groups(iter(walked(make_tar(files))))
    assert isinstance(group, Group)
    assert read_group(group, "s.tar").captions == captions


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.txt": b"\xff\xfe\xff"}, Reason.BAD_TEXT),
        ({"a.json": b"{not json"}, Reason.BAD_JSON),
        ({"a.json": b"[" * 100_000}, Reason.BAD_JSON),
        ({"a.jpg": b"i", "a.cls": b"three"}, Reason.BAD_TEXT),
    ],
)
def test_unreadable_text_has_a_reason(files: dict[str, bytes], reason: Reason) -> None:
    (group,) = groups(iter(walked(make_tar(files))))
    assert isinstance(group, Group)
    with pytest.raises(SampleProblem) as caught:
        read_group(group, "s.tar")
    assert caught.value.reason is reason


def test_a_span_is_checked_against_the_index() -> None:
    data = make_tar({"a.jpg": b"i" * 600, "a.txt": b"t", "b.jpg": b"j", "b.txt": b"u"})
    first, second = (g for g in groups(iter(walked(data))) if isinstance(g, Group))
    span = data[first.start : first.end]
    assert read_group(group_of_span(span, "s.tar", check=first.check, occurrence=0), "s.tar").captions == ["t"]
    for damaged in (span[BLOCK:], span[:-BLOCK], b"", data[first.start : second.end], bytes(len(span))):
        with pytest.raises(SampleProblem) as caught:
            group_of_span(damaged, "s.tar", check=first.check, occurrence=0)
        assert caught.value.reason is Reason.CHANGED


def test_other_projects_odd_shards(photos: Path) -> None:
    reasons = {}
    for path in sorted((photos / "odd-shards").glob("*.tar")):
        found = list(groups(iter(walked(path.read_bytes()))))
        reasons[path.stem] = (sum(isinstance(g, Group) for g in found), sum(isinstance(g, Hole) for g in found))
    assert reasons == {"directory-entry-gz-members": (0, 3), "images-without-text": (4, 0), "same-stem-jpg-png": (1, 0)}


def test_what_a_pax_header_says_is_not_of_the_member_after_a_damaged_one() -> None:
    data = bytearray(make_tar({"cat.jpg": b"cat", "dog.txt": b"a dog", "dog.jpg": b"dog"}))
    before, rest = data[: 2 * BLOCK], data[2 * BLOCK :]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.txt")
        info.size, info.pax_headers = 5, {"path": "cat.txt"}
        tar.addfile(info, io.BytesIO(b"a cat"))
    extended = bytearray(buffer.getvalue()[: 4 * BLOCK])  # its header and record, the member's header and data
    extended[2 * BLOCK : 3 * BLOCK] = b"?" * BLOCK
    found = walked(bytes(before + extended[: 3 * BLOCK] + rest))
    assert [entry.name for entry in found if isinstance(entry, Member)] == ["cat.jpg", "dog.txt", "dog.jpg"]
    assert [entry.reason for entry in found if isinstance(entry, Hole)] == [Reason.BAD_HEADER]


def test_a_fault_of_one_extended_header_is_not_mended_by_the_next() -> None:
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    data = long_name.tobuf() + b"n" * (2 << 20)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.txt")
        info.size, info.pax_headers = 5, {"comment": "small"}
        tar.addfile(info, io.BytesIO(b"a cat"))
    (hole,) = walked(data + buffer.getvalue())
    assert isinstance(hole, Hole)
    assert "above 1048576" in hole.detail


def test_names_and_uids_have_a_bound() -> None:
    (hole,) = groups(walk(io.BytesIO(make_tar({"n" * 5000 + ".txt": b"t"}, tarfile.GNU_FORMAT)), max_member_bytes=1000))
    assert isinstance(hole, Hole)
    assert hole.reason is Reason.BAD_HEADER
    (group,) = groups(walk(io.BytesIO(make_tar({"a.json": b'{"uid": "' + b"u" * 2000 + b'"}'})), max_member_bytes=4000))
    assert isinstance(group, Group)
    with pytest.raises(SampleProblem, match="a uid of 2,000 characters"):
        read_group(group, "shard.tar")
