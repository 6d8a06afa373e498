"""What a caller sends, checked against the bounds before anything is computed; and how a vector goes back."""

from __future__ import annotations

import base64
import binascii

import numpy as np
from numpy.typing import NDArray

from serve.config import ServeConfig
from serve.problems import BadInput


def is_image(value: str) -> bool:
    """A data URI; any other string is a text."""
    return value[:5].lower() == "data:"


def checked(value: str, name: str, config: ServeConfig) -> str | bytes:
    """A text as it is, an image as its bytes; `name` is the field it came in.

    Raises:
        BadInput: empty, too long, or not base64.
    """
    if not is_image(value):
        if not value.strip():
            raise BadInput(f"{name}: the text is empty", 422)
        if len(value) > config.max_text_characters:
            raise BadInput(f"{name}: {len(value):,} characters, at most {config.max_text_characters:,}", 413)
        return value
    head, comma, body = value.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise BadInput(f"{name}: a data URI must be base64: data:image/jpeg;base64,…", 422)
    size = len(body) * 3 // 4
    if size > config.max_image_bytes:
        raise BadInput(f"{name}: a picture of about {size:,} bytes, at most {config.max_image_bytes:,}", 413)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"{name}: not valid base64 ({error})", 422) from None


def encoded(vector: NDArray[np.float32], encoding: str) -> list[float] | str:
    """A vector as JSON numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
