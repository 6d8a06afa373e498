"""Seeded hostile and odd shards, made byte by byte: `cases()` yields the same ones every time.

Each case says what an honest reader must find: how many usable samples, and which reasons are counted. Cases of random damage say
less: what is whole before the damage, and that something is counted.
"""

from __future__ import annotations

import io
import random
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

BLOCK = 512
END = bytes(2 * BLOCK)


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    samples: int | None
    """Usable samples; None where chance decides."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Exactly these; where `samples` is None, at least one of any."""


def header(name: bytes, size: int, kind: bytes = b"0", *, size_field: bytes | None = None, tail: dict[int, bytes] | None = None) -> bytes:
    """A ustar header whose checksum holds, whatever the fields say."""
    block = bytearray(BLOCK)
    block[: min(len(name), 100)] = name[:100]
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = (size_field if size_field is not None else b"%011o\0" % size).ljust(12, b"\0")
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, b"ustar\00000"
    for offset, value in (tail or {}).items():
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: str | bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name.encode() if isinstance(name, str) else name, len(data), kind) + padded(data)


def pax(data: bytes, kind: bytes = b"x") -> bytes:
    return member("pax", data, kind)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def encoded(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (24, 16), mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = random.Random(seed)
    return Image.frombytes("L", size, noise.randbytes(size[0] * size[1])).convert("RGB").convert(mode)


JPEG = encoded(picture())


def pair(key: str, image: bytes = JPEG, text: bytes = b"a caption", suffix: str = "jpg") -> bytes:
    return member(f"{key}.{suffix}", image) + member(f"{key}.txt", text)


GOOD = pair("good")


def png_header(width: int, height: int, idat: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + extra + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def cases(seed: int = 0) -> Iterator[Case]:
    """More than 200 cases; the same for the same seed."""
    yield from _names()
    yield from _kinds()
    yield from _extended_headers()
    yield from _sizes()
    yield from _cuts()
    yield from _zeros()
    yield from _doubles()
    yield from _checksums()
    yield from _images()
    yield from _texts()
    yield from _random_damage(random.Random(seed))


def _around(name: str, middle: bytes, samples: int, reasons: dict[str, int] | None = None) -> Case:
    """`middle` between two good samples: what is odd must cost neither."""
    return Case(name, pair("before") + middle + pair("after") + END, samples + 2, reasons or {})


def _names() -> Iterator[Case]:
    for i, key in enumerate(
        ("../x", "../../../../tmp/evil", "/etc/passwd", "//double", "a/../b", "./here", "a\\b", "C:/x", "-rf", "a b", "ü-é", "x" * 90)
    ):
        yield _around(f"name {i} {key[:20]!r}", pair(key), 1)
    for i, key in enumerate((b"\xff\xfe", b"new\nline", b"\x1b[31m", b"tab\t", b"%s%n", b"$(id)")):
        middle = member(key + b".jpg", JPEG) + member(key + b".txt", b"t")
        yield _around(f"name bytes {i}", middle, 1)
    for name in ("noext", ".hidden", "x.", "._a.jpg", "a.jpg.gz", "b.tar", "c.ZIP", "", "dir/"):
        yield _around(f"no member {name!r}", member(name, b"data"), 0, {"unsupported_member": 1})
    yield _around("suffix not in UTF-8", member(b"a.\xff", b"x"), 0, {"no_image": 1})
    yield _around("upper case", member("a.JPG", JPEG) + member("a.TXT", b"t"), 1)
    yield _around("dots and folders", pair("a.b/c.1.2") + pair("a.b/c.1.3"), 2)
    yield _around("text before image", member("a.txt", b"t") + member("a.json", b"{}") + member("a.jpg", JPEG), 1)
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            length = 200 if tar_format == tarfile.USTAR_FORMAT else 3000
            for suffix, data in (("jpg", JPEG), ("txt", b"t")):
                entry = tarfile.TarInfo("folder/" * (length // 14) + "n" * 80 + "." + suffix)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        yield Case(f"long name in format {tar_format}", buffer.getvalue(), 1)
    old = bytearray(member("v7.jpg", JPEG) + member("v7.txt", b"t"))
    for at in (0, len(member("v7.jpg", JPEG))):
        old[at + 257 : at + 265], old[at + 156 : at + 157], old[at + 148 : at + 156] = bytes(8), b"\0", b" " * 8
        old[at + 148 : at + 156] = b"%06o\0 " % sum(old[at : at + BLOCK])
    yield _around("v7 headers", bytes(old), 1)


def _kinds() -> Iterator[Case]:
    for kind in b"12346":
        block = header(b"link.jpg", 0, bytes([kind]), tail={157: b"../../etc/passwd"})
        yield _around(f"type {chr(kind)}", block, 0, {"unsupported_member": 1})
        block = header(b"link.jpg", 4096, bytes([kind]), tail={157: b"/etc/passwd"})
        yield _around(f"type {chr(kind)} that claims data", block, 0, {"unsupported_member": 1})
    yield _around("folder", header(b"d/", 0, b"5"), 0)
    yield _around("folder as old tars write it", header(b"d/", 0), 0)
    yield _around("nested folder", header(b"d/e/", 0, b"5"), 0, {"unsupported_member": 1})
    for kind in b"DMVNZ9":
        yield _around(f"type {chr(kind)}", member("odd.jpg", JPEG, bytes([kind])), 0, {"unsupported_member": 1})
    yield _around("contiguous file", member("a.jpg", JPEG, b"7") + member("a.txt", b"t"), 1)
    yield _around("GNU sparse", header(b"s.jpg", 600, b"S") + bytes([7]) * 1024, 0, {"unsupported_member": 1})
    more = bytearray(BLOCK)
    more[504] = 1
    sparse = header(b"s.jpg", 600, b"S", tail={482: b"\1"}) + bytes(more) * 3 + bytes(BLOCK) + bytes([7]) * 1024
    yield _around("GNU sparse with a long map", sparse, 0, {"unsupported_member": 1})
    yield _around("pax sparse", pax(record(b"GNU.sparse.major", b"1")) + member("s.jpg", JPEG), 0, {"unsupported_member": 1})
    forever = header(b"s.jpg", 0, b"S", tail={482: b"\1"}) + bytes(more) * 500
    yield Case("GNU sparse map without end", GOOD + forever, 1, {"unsupported_member": 1, "truncated": 1})


def _extended_headers() -> Iterator[Case]:
    def named(records: bytes, kind: bytes = b"x") -> bytes:
        return pax(records, kind) + member("short.jpg", JPEG)

    bad = {"bad_header": 1}
    yield _around("pax name", pax(record(b"path", b"long/p.jpg")) + member("q.jpg", JPEG) + member("long/p.txt", b"t"), 1)
    yield _around("pax of 2 MiB", named(record(b"comment", b"x" * (2 << 20))), 0, bad)
    yield _around("pax of 1 MiB of records", pax(record(b"a", b"") * 170_000) + pair("p"), 1)
    yield _around("name of 2 MiB", member("././@LongLink", b"n" * (2 << 20), b"L") + member("n.jpg", JPEG), 0, bad)
    yield _around("global pax", pax(record(b"comment", b"x"), b"g") + pair("g"), 1)
    yield _around("global pax of 2 MiB", pax(record(b"comment", b"x" * (2 << 20)), b"g") + pair("g"), 0, bad | {"no_image": 1})
    yield _around("a hundred pax headers", pax(record(b"path", b"p.jpg")) * 100 + member("q.jpg", JPEG) + member("p.txt", b"t"), 1)
    for i, records in enumerate(
        (
            b"nonsense",
            b"0 a=b\n",
            b"99999 path=x\n",
            b"-5 a=b\n",
            b"9" * 5000 + b" a=b\n",
            b"3 \n",
            b" 6 a=b\n",
            b"7 path\n",
            record(b"size", b"9" * 5000),
            record(b"size", b"-1"),
            record(b"size", b"1e3"),
            record(b"size", "٣".encode()),
            record(b"path", b"p.jpg")[:-3],
        )
    ):
        yield _around(f"malformed pax {i}", named(records), 0, bad)
    yield _around("pax header of no bytes", pax(b"") + pair("p"), 1)
    yield _around("pax name not in UTF-8", pax(record(b"path", b"\xff.jpg")) + member("q.jpg", JPEG), 0, {"no_text": 1})
    yield Case("pax header at the end", GOOD + pax(record(b"path", b"p.jpg")) + END, 1, bad)
    yield Case("pax size of 10^17", GOOD + named(record(b"size", b"9" * 17)) + END, 1, {"truncated": 1})
    yield Case("only pax headers", pax(record(b"path", b"p.jpg")) * 300 + END, 0, bad)


def _sizes() -> Iterator[Case]:
    for name, field_bytes in (
        ("negative octal", b"-0000000010"),
        ("underscores", b"0000_000_10"),
        ("decimal digits", b"00000000999"),
        ("letters", b"hello world"),
        ("negative base 256", b"\xff" * 12),
        ("base 256 above 64 bits", b"\x80" + b"\xff" * 11),
    ):
        yield _around(f"size {name}", header(b"a.jpg", 0, size_field=field_bytes) + b"\1" * BLOCK, 0, {"bad_header": 1})
    for name, field_bytes in (("8 GiB", b"77777777777\0"), ("base 256, 2^62", b"\x80" + bytes(3) + b"\x40" + bytes(7))):
        yield Case(f"size {name}", GOOD + header(b"a.jpg", 0, size_field=field_bytes) + b"\1" * 4096, 1, {"truncated": 1})
    yield _around("size with blanks", header(b"a.jpg", 0, size_field=b"%9o " % len(JPEG)) + padded(JPEG) + member("a.txt", b"t"), 1)
    in_base_256 = b"\x80" + len(JPEG).to_bytes(11, "big")
    yield _around("size in base 256", header(b"a.jpg", 0, size_field=in_base_256) + padded(JPEG) + member("a.txt", b"t"), 1)


def _cuts() -> Iterator[Case]:
    whole = b"".join(pair(str(i)) for i in range(3))
    ends = [len(b"".join(pair(str(i)) for i in range(n))) for n in range(4)]
    starts = sorted({e for n in range(3) for e in (ends[n], ends[n] + len(member("0.jpg", JPEG)))} | {ends[3]})
    for start in starts[1:]:
        for shift in (-1, 0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1):
            cut = min(start + shift, len(whole))
            samples = sum(cut >= end for end in ends[1:])
            halves = samples < 3 and (cut - ends[samples] >= len(member("0.jpg", JPEG)))
            yield Case(f"cut at {cut}", whole[:cut], samples, {"truncated": 1} | ({"no_text": 1} if halves else {}))
    yield Case("one block", whole[:BLOCK], 0, {"truncated": 1})
    yield Case("one byte", b"x", 0, {"truncated": 1})


def _zeros() -> Iterator[Case]:
    blocks = pair("0") + pair("1") + pair("2")
    for block in range(0, len(blocks) // BLOCK):
        damaged = blocks[: block * BLOCK] + bytes(BLOCK) + blocks[(block + 1) * BLOCK :]
        is_header = blocks[block * BLOCK + 257 : block * BLOCK + 262] == b"ustar"
        data = bytearray(damaged + END)
        if is_header:
            yield Case(f"zeroed header at block {block}", bytes(data), 2, {"bad_header": 1, **_lacks(blocks, block)})
    yield _around("header of an empty member zeroed", bytes(BLOCK), 0, {"bad_header": 1})
    yield _around("ten blocks of zeros", bytes(10 * BLOCK), 0, {"bad_header": 1})
    first = GOOD + bytes(-len(GOOD) % (20 * BLOCK) + 20 * BLOCK)
    yield Case("one tar after another", first + pair("b") + END, 2)
    yield Case("4 MiB of zeros at the end", GOOD + bytes(4 << 20), 1, {"truncated": 1})
    yield Case("only zeros", bytes(20 * BLOCK), 0)
    yield Case("4 MiB of zeros", bytes(4 << 20), 0, {"truncated": 1})
    yield Case("one zero block at the end", GOOD + bytes(BLOCK), 1)
    yield Case("garbage after the end", GOOD + END + b"\1" * 2048, 1, {"bad_header": 1})


def _lacks(blocks: bytes, block: int) -> dict[str, int]:
    is_image = b".jpg" in blocks[block * BLOCK : block * BLOCK + 100]
    return {"no_image": 1} if is_image else {"no_text": 1}


def _doubles() -> Iterator[Case]:
    yield _around("one member twice", member("a.jpg", JPEG) * 2 + member("a.txt", b"t"), 1, {"no_text": 1})
    yield _around("one sample twice", pair("a") * 2, 2)
    yield _around("one sample fifty times", pair("a") * 50, 50)
    yield _around("a key that comes back", pair("a") + pair("b") + pair("a"), 3)
    yield _around("one stem, two formats", member("a.jpg", JPEG) + member("a.png", encoded(picture(), "PNG")) + member("a.txt", b"t"), 1)
    many = b"".join(member(f"a.s{i}", b"") for i in range(3000))
    yield _around("3,000 members of one key", many, 0, {"no_image": 3})
    yield _around("a tar in a member", member("a.tar", GOOD + END), 0, {"unsupported_member": 1})


def _checksums() -> Iterator[Case]:
    one = member("x.jpg", JPEG)
    for at in (0, 50, 124, 148, 150, 156, 257, 345, 511):
        damaged = bytearray(one)
        damaged[at] ^= 0x55
        yield _around(f"a wrong byte {at} of a header", bytes(damaged), 0, {"bad_header": 1})
    signed = bytearray(header(b"\xfc.jpg", len(JPEG)))
    signed[148:156] = b" " * 8
    signed[148:156] = b"%06o\0 " % sum(b - 256 * (b > 127) for b in signed)
    yield _around("a sum of signed bytes", bytes(signed) + padded(JPEG) + member(b"\xfc.txt", b"t"), 1)


def _images() -> Iterator[Case]:
    rgb = picture((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [picture((16, 16), seed=i) for i in range(3)]
    fine = {
        "progressive": (encoded(rgb, progressive=True), "jpg"),
        "4:4:4": (encoded(rgb, subsampling=0), "jpg"),
        "grey JPEG": (encoded(rgb.convert("L")), "jpg"),
        "CMYK JPEG": (encoded(rgb.convert("CMYK")), "jpg"),
        "EXIF-rotated": (encoded(rgb, exif=exif), "jpg"),
        "one pixel": (encoded(picture((1, 1))), "jpg"),
        "thin": (encoded(picture((2000, 1))), "jpg"),
        "grey PNG": (encoded(rgb.convert("L"), "PNG"), "png"),
        "grey and alpha": (encoded(rgb.convert("LA"), "PNG"), "png"),
        "alpha": (encoded(rgb.convert("RGBA"), "PNG"), "png"),
        "16-bit": (encoded(Image.frombytes("I;16", (8, 8), bytes(range(128))), "PNG"), "png"),
        "palette": (encoded(rgb.convert("P"), "PNG"), "png"),
        "one bit": (encoded(rgb.convert("1"), "PNG"), "png"),
        "animated PNG": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "png"),
        "WebP": (encoded(rgb, "WEBP"), "webp"),
        "lossless WebP with alpha": (encoded(rgb.convert("RGBA"), "WEBP", lossless=True), "webp"),
        "animated WebP": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "webp"),
        "PNG called jpg": (encoded(rgb, "PNG"), "jpg"),
        "JPEG called png": (encoded(rgb), "png"),
        "WebP called jpeg": (encoded(rgb, "WEBP"), "jpeg"),
    }
    for name, (data, suffix) in fine.items():
        yield _around(name, pair("i", data, suffix=suffix), 1)
    for name, data in {
        "GIF": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "TIFF": encoded(rgb, "TIFF"),
        "BMP": encoded(rgb, "BMP"),
        "text": b"<html>404</html>",
        "JPEG's first bytes only": JPEG[:3],
        "half a PNG signature": b"\x89PNG",
        "PNG signature only": b"\x89PNG\r\n\x1a\n",
        "WebP's first bytes only": b"RIFF\x10\0\0\0WEBP",
        "PNG of width 0": png_header(0, 5),
        "an EPS that would start a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "a pickle": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    }.items():
        yield _around(f"{name} for an image", pair("i", data), 0, {"not_an_image": 1})
    yield _around("0 bytes for an image", pair("i", b""), 0, {"empty_image": 1})
    bomb = zlib.compress(bytes(50_000 * 3), 9)
    for side in (5001, 20_000, 60_000, 2**31 - 1):
        yield _around(f"PNG bomb of {side}", pair("i", png_header(side, side, bomb), suffix="png"), 0, {"too_many_pixels": 1})
    jpeg = bytearray(JPEG)
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    yield _around("JPEG bomb", pair("i", bytes(jpeg)), 0, {"too_many_pixels": 1})


def _texts() -> Iterator[Case]:
    def described(data: bytes) -> bytes:
        return member("t.jpg", JPEG) + member("t.json", data)

    bad_json, bad_text = {"bad_json": 1}, {"bad_text": 1}
    for i, text in enumerate((b"\xff\xfe", b"\xc3", b"ok \xed\xa0\x80", b"\x80abc")):
        yield _around(f"text not in UTF-8 {i}", pair("t", text=text), 0, bad_text)
    for i, data in enumerate((b"", b"{", b"nope", b"[" * 100_000, b'{"caption": "\xff"}', b'{"n": ' + b"9" * 5000 + b"}", b"\0" * 100)):
        yield _around(f"bad JSON {i}", described(data), 0, bad_json)
    for i, data in enumerate((b'{"caption": "\\ud800"}', b'{"captions": ["fine", "\\udfff x"]}', b'{"uid": "\\ud800", "caption": "c"}')):
        yield _around(f"half a surrogate pair {i}", described(data), 0, bad_text)
    for i, data in enumerate((b"[]", b"3", b"null", b'"x"', b"{}", b'{"captions": [1, null]}', b'{"caption": " "}')):
        yield _around(f"JSON without a caption {i}", described(data), 0, {"no_text": 1})
    yield _around("blank text", pair("t", text=b" \n"), 0, {"no_text": 1})
    yield _around("JSON of 5 MiB", described(b"[" + b"[]," * (5 << 20 >> 1) + b"0]"), 0, {"member_too_large": 1})
    yield _around("text of 5 MiB", pair("t", text=b"x" * (5 << 20)), 0, {"member_too_large": 1})
    for i, label in enumerate((b"three", b"", b"1.5", b"99999999999", b"-1", b"9" * 5000, b"\xff")):
        yield _around(f"class {i}", pair("t") + member("t.cls", label), 0, bad_text)


def _random_damage(draw: random.Random) -> Iterator[Case]:
    whole = b"".join(pair(str(i)) for i in range(4)) + END
    for i in range(60):
        data = bytearray(whole)
        match i % 4:
            case 0:
                for _ in range(20):
                    data[draw.randrange(len(data))] = draw.randrange(256)
            case 1:
                at = draw.randrange(len(data))
                del data[at : at + draw.randrange(1, 3000)]
            case 2:
                at = draw.randrange(len(data))
                data[at:at] = draw.randbytes(draw.randrange(1, 3000))
            case 3:
                first, last = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
                data[first:last] = draw.randbytes(last - first)
        yield Case(f"random damage {i}", bytes(data), None)


def count(all_cases: list[Case]) -> Counter[str]:
    """How many cases expect each reason."""
    return Counter(reason for case in all_cases for reason in case.reasons)
