"""Pictures and bodies that have been tampered with, from a seed: what a hostile or broken client sends."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Bytes = Callable[[random.Random, bytes], bytes]


def originals() -> list[bytes]:
    """Small pictures of every kind that is read."""
    random_ = np.random.default_rng(0)
    found = []
    for mode, shape in (("RGB", (24, 31, 3)), ("L", (17, 9)), ("RGBA", (12, 40, 4)), ("CMYK", (16, 16, 4))):
        picture = Image.fromarray(random_.integers(0, 256, shape, dtype=np.uint8), mode)
        for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("TIFF", {})):
            try:
                buffer = io.BytesIO()
                picture.save(buffer, kind, **options)
            except (OSError, ValueError):
                continue  # not every kind has every mode
            found.append(buffer.getvalue())
    return found


def _flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def _insert(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.choice((1, 4, 100))) + data[at:]


def _header(draw: random.Random, data: bytes) -> bytes:
    """Numbers where a size stands: enormous, zero, negative."""
    at = draw.randrange(min(40, len(data)))
    piece = struct.pack(draw.choice((">I", "<I")), draw.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)))
    return data[:at] + piece + data[at + 4 :]


def _repeat(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    piece = data[start : start + draw.randrange(1, 200)]
    return data[:start] + piece * draw.choice((2, 10, 50)) + data[start:]


def _noise(draw: random.Random, data: bytes) -> bytes:
    return data[:4] + draw.randbytes(draw.randrange(2000))


_PICTURES: tuple[Bytes, ...] = (_flip, _cut, _insert, _header, _repeat, _noise)


def picture(seed: int, pictures: list[bytes]) -> bytes:
    draw = random.Random(seed)
    data = draw.choice(pictures)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if data:
            data = draw.choice(_PICTURES)(draw, data)
    return data[:20_000]


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, -1e308, 10**400, 0.1, "", " ", "\0", "\u202e", "\ufeff", "é" * 50, "🏳️‍🌈" * 20, "\u0301" * 90, "x" * 201),
    *(
        "ﷺ" * 60,
        "data:",
        "data:,",
        "data:image/png;base64,",
        "data:image/png;base64,====",
        "data:image/png;base64,AAAA",
        "https://127.0.0.1/x",
    ),
    *([], {}, [[]], [None], {"text": None}, {"image": 3}, {"text": "a", "image": "b"}, "{c}", "../../etc/passwd", "' OR 1=1", "\\ud800"),
)


def body(seed: int, examples: list[dict[str, Any]]) -> bytes:
    """A body of a request, a part of it replaced by what does not belong there, and now and then its bytes damaged."""
    draw = random.Random(seed)
    value: Any = json.loads(json.dumps(draw.choice(examples)))
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        _replace(draw, value)
    data = json.dumps(value).replace("1e+308", draw.choice(("1e+308", "NaN", "Infinity"))).encode("utf-8", "surrogatepass")
    if draw.random() < 0.3:
        data = draw.choice((_flip, _cut, _insert, _repeat))(draw, data)
    return data[:100_000]


def _replace(draw: random.Random, value: Any) -> None:
    while isinstance(value, dict | list) and value:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        if isinstance(value[key], dict | list) and value[key] and draw.random() < 0.6:
            value = value[key]
            continue
        if draw.random() < 0.15 and isinstance(value, dict):
            value[str(draw.choice(ODD))[:40]] = value.pop(key)
        else:
            value[key] = copy.deepcopy(draw.choice(ODD))
        return


def data_uri(data: bytes) -> str:
    return f"data:image/*;base64,{base64.b64encode(data).decode()}"
