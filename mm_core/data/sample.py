"""One sample: the members of a tar that share a key, and what they say (image bytes, captions, label, uid).

The same grouping and the same reading serve the index, the training stream and the evaluation, so they cannot disagree.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.tar import Hole, Member, walk

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_COMPRESSED_SUFFIXES = ("gz", "bz2", "xz", "zst", "zip", "tar")
CAPTION_KEYS = ("captions", "caption", "text")
MAX_MEMBER_BYTES = 256 << 20
"""Of a member, and of what is held of one sample."""
_MAX_TEXT_BYTES = 4 << 20
"""JSON takes up to 25 times its size when it is read, so it has a bound of its own."""
_MAX_MEMBERS = 1024
_MAX_NAME = 4096
_MAX_UID = 1024
"""Characters: names and uids of every row of a batch are held at a time."""
MAX_OCCURRENCE = 0xFFFF
_LONG_KEY = 64
_MAX_LABEL = 2**31 - 1


@dataclass
class Group:
    """Consecutive members with one key, as webdataset groups them; a suffix that comes again starts the next group.

    Never more than 1,024 members and 256 MB: members above that are kept without their data.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    occurrence: int = 0
    """How many groups of this key the shard held before."""
    held_bytes: int = 0

    def add(self, suffix: str, member: Member) -> None:
        if self.held_bytes + member.size > MAX_MEMBER_BYTES:
            member = member._replace(data=None)
        elif member.data is not None:
            self.held_bytes += member.size
        self.members[suffix] = member

    @property
    def start(self) -> int:
        return next(iter(self.members.values())).start

    @property
    def end(self) -> int:
        return next(reversed(self.members.values())).end

    @property
    def check(self) -> int:
        """CRC-32 of the members' names and sizes: a ranged read that disagrees is not the sample that was indexed."""
        listing = "\n".join(f"{m.name} {m.size}" for m in self.members.values())
        return zlib.crc32(listing.encode("utf-8", "surrogateescape"))


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member's name. The key is all before the last dot, folders included: `a/img.1.jpg` →
    (`a/img.1`, `jpg`). webdataset splits at the first dot and makes one sample of `img.1.jpg` and `img.2.jpg`."""
    folder, _, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    if not dot or not stem:
        return name, ""
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def groups(entries: Iterator[Member | Hole]) -> Iterator[Group | Hole]:
    """Gather members into samples, in order; what can belong to none is a hole."""
    current: Group | None = None
    seen: dict[str, int] = {}
    for entry in entries:
        if isinstance(entry, Hole):
            yield entry
            continue
        if len(entry.name) > _MAX_NAME:
            yield Hole(Reason.BAD_HEADER, entry.start, f"a name of {len(entry.name):,} characters")
            continue
        key, suffix = split_name(entry.name)
        if not suffix or suffix in _COMPRESSED_SUFFIXES or key.rpartition("/")[2].startswith("._"):
            yield Hole(Reason.UNSUPPORTED_MEMBER, entry.start, f"{entry.name!r} has no suffix that is read")
            continue
        if current is None or current.key != key or suffix in current.members or len(current.members) == _MAX_MEMBERS:
            if current is not None:
                yield current
            short = key if len(key) <= _LONG_KEY else hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
            current = Group(key, occurrence=seen.get(short, 0))
            seen[short] = current.occurrence + 1
        current.add(suffix, entry)
    if current is not None:
        yield current


@dataclass(frozen=True)
class Sample:
    """What a group holds. A missing modality is None or empty; whether that is a problem is the reader's to say."""

    key: str
    uid: str
    image: bytes | None
    captions: list[str]
    label: int | None


def read_group(group: Group, shard_name: str) -> Sample:
    """Interpret a group's members.

    Raises:
        SampleProblem: a member too large, or text or JSON that cannot be read.
    """
    metadata = metadata_of(group)
    uid = uid_of(group, metadata, shard_name)
    captions = _captions(group, metadata)
    for text in (uid, *captions):
        _refuse_surrogates(group, text)
    return Sample(key=group.key, uid=uid, image=_image(group), captions=captions, label=_label(group))


def group_of_span(span: bytes, shard_name: str, *, check: int, occurrence: int, digest: str | None = None) -> Group:
    """The members of one sample, from its bytes as the index's locator bounds them.

    Raises:
        SampleProblem: CHANGED where names or sizes, or with `digest` the content, are not those that were indexed.
    """
    found = [g for g in groups(walk(io.BytesIO(span), max_member_bytes=MAX_MEMBER_BYTES, whole=False)) if isinstance(g, Group)]
    if len(found) != 1 or found[0].check != check:
        raise SampleProblem(Reason.CHANGED, f"in {shard_name}: the bytes are not the sample that was indexed")
    if digest is not None and content_digest(found[0]) != digest:
        raise SampleProblem(Reason.CHANGED, f"in {shard_name}: {found[0].key!r} has another content than when it was indexed")
    found[0].occurrence = occurrence
    return found[0]


def uid_of(group: Group, metadata: dict[str, Any], shard_name: str) -> str:
    """The `uid` of its JSON, else one derived from its place.

    Raises:
        SampleProblem: BAD_JSON, for a uid that is too long to be one.
    """
    uid = metadata.get("uid")
    if isinstance(uid, str) and len(uid) > _MAX_UID:
        raise SampleProblem(Reason.BAD_JSON, f"{group.key!r}: a uid of {len(uid):,} characters, above {_MAX_UID:,}")
    return uid if isinstance(uid, str) and uid else derived_uid(shard_name, group.key, group.occurrence)


def content_digest(group: Group) -> str:
    """The first 128 bits of SHA-256 over suffixes, sizes and bytes: what processors have instructions for (twice blake2b's rate)."""
    digest = hashlib.sha256()
    for suffix, member in group.members.items():
        digest.update(f"{suffix} {member.size}\0".encode("utf-8", "surrogateescape"))
        digest.update(member.data or b"")
    return digest.hexdigest()[:32]


def derived_uid(shard_name: str, key: str, occurrence: int) -> str:
    """The uid of a sample whose JSON has none: 32 hexadecimal digits of blake2b over its place."""
    place = f"{shard_name}\0{key}\0{occurrence}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(place, digest_size=16).hexdigest()


def _data(group: Group, suffix: str) -> bytes | None:
    member = group.members.get(suffix)
    if member is None:
        return None
    if member.data is None:
        raise SampleProblem(Reason.MEMBER_TOO_LARGE, f"{member.name!r} has {member.size} bytes")
    return member.data


def _text_data(group: Group, suffix: str) -> bytes | None:
    data = _data(group, suffix)
    if data is not None and len(data) > _MAX_TEXT_BYTES:
        raise SampleProblem(Reason.MEMBER_TOO_LARGE, f"{group.key!r}: {len(data)} bytes of .{suffix}, above {_MAX_TEXT_BYTES}")
    return data


def _refuse_surrogates(group: Group, text: str) -> None:
    """JSON can spell half of a surrogate pair, which no encoding, and so no table and no tokenizer, takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleProblem(Reason.BAD_TEXT, f"{group.key!r}: {error}") from None


def _image(group: Group) -> bytes | None:
    for suffix in group.members:
        if suffix in IMAGE_SUFFIXES:
            return _data(group, suffix)
    return None


def metadata_of(group: Group) -> dict[str, Any]:
    """Its JSON; empty where it has none, or one that is no object.

    Raises:
        SampleProblem: it cannot be read.
    """
    data = _text_data(group, "json")
    if data is None:
        return {}
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleProblem(Reason.BAD_JSON, f"{group.key!r}: {error}") from None
    return loaded if isinstance(loaded, dict) else {}


def _captions(group: Group, metadata: dict[str, Any]) -> list[str]:
    """The JSON's list `captions`, else `.txt`, else the JSON's `caption` or `text`; blank ones left out."""
    listed = metadata.get("captions")
    if isinstance(listed, list):
        texts = [text for text in listed if isinstance(text, str) and text.strip()]
        if texts:
            return texts
    data = _text_data(group, "txt")
    if data is not None:
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise SampleProblem(Reason.BAD_TEXT, f"{group.key!r}: {error}") from None
        return [text] if text else []
    for key in CAPTION_KEYS:
        value = metadata.get(key)
        if isinstance(value, str) and value.strip():
            return [value.strip()]
    return []


def _label(group: Group) -> int | None:
    """The class of a `.cls` member, as CLIP_benchmark writes it."""
    data = _text_data(group, "cls")
    if data is None:
        return None
    try:
        label = int(data.decode("ascii").strip())
    except ValueError:
        raise SampleProblem(Reason.BAD_TEXT, f"{group.key!r}: class {data[:20]!r} is no number") from None
    if not 0 <= label <= _MAX_LABEL:
        raise SampleProblem(Reason.BAD_TEXT, f"{group.key!r}: class {label} is not in 0 to {_MAX_LABEL}")
    return label
