from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_core.data.copies import Copies
from mm_core.data.export import END_BYTES, ExportOrder, ShardFile, members_of, shard_ends
from mm_core.data.ledger import Kept
from mm_core.data.personal import PersonalKind
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.sample import Group, content_digest, derived_uid, groups
from mm_core.data.tar import Member, walk


def group(**members: bytes) -> Group:
    made = Group("k")
    for suffix, data in members.items():
        made.add(suffix, Member(f"k.{suffix}", 0, 512, len(data), data))
    return made


def written(*samples: Group, mask: tuple[PersonalKind, ...] = ()) -> bytes:
    file = io.BytesIO()
    shard = ShardFile(file)
    for place, sample in enumerate(samples):
        shard.write(place, members_of(sample, "s.tar", mask))
    shard.close()
    return file.getvalue()


@given(st.lists(st.integers(1, 50), max_size=60), st.none() | st.integers(1, 120), st.none() | st.integers(1, 9))
def test_shards_are_filled_in_order_up_to_their_bounds(sizes: list[int], max_bytes: int | None, max_samples: int | None) -> None:
    expected: list[list[int]] = []
    for size in sizes:
        full = expected and (
            (max_bytes is not None and sum(expected[-1]) + size > max_bytes)
            or (max_samples is not None and len(expected[-1]) == max_samples)
        )
        if full or not expected:
            expected.append([])
        expected[-1].append(size)
    ends = shard_ends(np.array(sizes, dtype=np.uint32), max_bytes=max_bytes, max_samples=max_samples)
    assert ends == np.cumsum([len(shard) for shard in expected]).tolist()


def test_a_sample_is_written_as_it_is() -> None:
    sample = group(txt=b" a caption ", jpg=b"\xff\xd8", json=b'{ "uid":"u", "x": 1.50 }', npy=b"")
    (found,) = groups(walk(io.BytesIO(written(sample)), max_member_bytes=1 << 20))
    assert isinstance(found, Group)
    assert content_digest(found) == content_digest(sample)
    assert found.key == "000000000"
    assert len(written(sample)) <= sum(512 + -(-m.size // 512) * 512 for m in sample.members.values()) + END_BYTES


@pytest.mark.parametrize(
    "json_before", [None, b"{}", b"{ }", b'{"a": [1, "\\ud800"], "uid": 3}', b'{"uid": "", "b": null}', b"\xef\xbb\xbf{}"]
)
def test_a_derived_uid_goes_into_the_json(json_before: bytes | None) -> None:
    sample = group(jpg=b"x", **({} if json_before is None else {"json": json_before}))
    sample.occurrence = 2
    after = dict(members_of(sample, "s.tar", ()))
    before = json.loads(json_before or b"{}")
    assert json.loads(after["json"]) == before | {"uid": derived_uid("s.tar", "k", 2)}
    assert after["jpg"] == b"x"


def test_json_that_is_no_object_stays() -> None:
    assert dict(members_of(group(jpg=b"x", json=b"[1]"), "s.tar", ())) == {"jpg": b"x", "json": b"[1]"}


def test_captions_are_masked_wherever_training_may_find_them() -> None:
    mail, hidden = "mail a@example.org", "mail [email]"
    metadata = {"uid": "u", "captions": [mail, 3, "fine"], "caption": mail, "text": mail, "url": "http://a@example.org/1"}
    sample = group(txt=f"{mail} \udcff".encode("utf-8", "surrogateescape"), json=json.dumps(metadata).encode(), jpg=mail.encode())
    after = dict(members_of(sample, "s.tar", (PersonalKind.EMAIL,)))
    assert after["txt"] == f"{hidden} ".encode() + b"\xff"
    assert json.loads(after["json"]) == metadata | {"captions": [hidden, 3, "fine"], "caption": hidden, "text": hidden}
    assert after["jpg"] == mail.encode()
    assert list(after) == ["txt", "json", "jpg"]


def test_what_cannot_be_written_is_a_reason() -> None:
    large = group(jpg=b"x")
    large.members["mp4"] = Member("k.mp4", 0, 512, 1 << 40, None)
    for sample, reason in ((large, Reason.MEMBER_TOO_LARGE), (group(jpg=b"x", __key__=b"y"), Reason.UNSUPPORTED_MEMBER)):
        with pytest.raises(SampleProblem) as caught:
            members_of(sample, "s.tar", ())
        assert caught.value.reason is reason


@given(st.integers(1, 200), st.booleans(), st.integers(0, 9))
def test_every_kept_sample_has_one_place(count: int, shuffle: bool, seed: int) -> None:
    kept = Kept(np.arange(0, 3 * count, 3, dtype=np.uint64), "f")
    order = ExportOrder(kept, shuffle=shuffle, seed=seed)
    places = order.between(0, len(order))
    assert sorted(places.tolist()) == kept.ordinals.tolist()
    assert np.concatenate([order.between(0, count // 2), order.between(count // 2, count)]).tolist() == places.tolist()
    assert shuffle or places.tolist() == kept.ordinals.tolist()


def test_repeated_samples_come_as_often_as_their_weight() -> None:
    weights = np.array([1, 3, 0.5, 0.5, 2], dtype=np.float64)
    kept = Kept(np.arange(5, dtype=np.uint64), "f", Copies.of(weights))
    for shuffle in (False, True):
        order = ExportOrder(kept, repeat=True, shuffle=shuffle, seed=1)
        counts = np.bincount(order.between(0, len(order)).astype(int), minlength=5)
        assert counts[[0, 1, 4]].tolist() == [1, 3, 2]
        assert counts[2] + counts[3] == 1
    assert len(ExportOrder(kept)) == 5
