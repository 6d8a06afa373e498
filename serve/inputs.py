"""What a caller sends, checked against the bounds before anything is computed; and how a vector goes back."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from mm_core.data.text import TEMPLATE_MARK
from serve.bounds import Hold
from serve.config import Bound
from serve.fetch import Fetcher
from serve.problems import InputError
from serve.schema import ImageInput, TextInput

_DATA_URI = re.compile(r"data:(?:[\w.+-]+/[\w.+*-]+)?(?:;[^,;]+)*[;,]", re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True)
class Picture:
    """An image as it came, not decoded."""

    data: bytes | str
    """Its bytes, or their base64: that is undone where pictures are decoded."""

    @property
    def content(self) -> bytes:
        """
        Raises:
            ValueError: not base64.
        """
        if isinstance(self.data, bytes):
            return self.data
        try:
            return base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not valid base64 ({error})") from None


Given = str | TextInput | ImageInput
"""An input as a request spells it: of bare strings those that are data URIs are images."""


class Checker:
    """Turns what requests spell into texts and pictures."""

    def __init__(self, bounds: Bound, fetcher: Fetcher) -> None:
        self._bounds, self._fetcher = bounds, fetcher

    async def inputs(self, given: Sequence[Given], names: Sequence[str], hold: Hold, field: str = "input") -> list[str | Picture]:
        """Texts and pictures in order.

        Args:
            names: of each, for messages.
            hold: counts what is fetched among the bytes that requests keep.

        Raises:
            InputError: none or too many, or one that `text` or `image` refuses.
        """
        if not given:
            raise InputError(f"{field}: the list is empty; give at least one text or image")
        if len(given) > self._bounds.max_inputs:
            raise InputError(f"{field}: {len(given):,} inputs in one call, at most {self._bounds.max_inputs:,}", 413)
        images = [_image_of(one) for one in given]
        self._fetcher.check_count([image for image in images if image is not None], field)
        return [
            self.text(_text_of(one), name) if image is None else await self.image(image, name, hold)
            for one, image, name in zip(given, images, names, strict=True)
        ]

    async def image(self, value: str, name: str, hold: Hold) -> Picture:
        """
        Raises:
            InputError: neither a base64 data URI nor a URL that may be fetched, or too long.
        """
        if _URL.match(value):
            return Picture(await self._fetcher.fetch(value, name, hold))
        head, comma, body = value.partition(",")
        if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
            raise InputError(f"{name}: an image is a base64 data URI: data:image/jpeg;base64,…")
        size = len(body) * 3 // 4
        if size > self._bounds.max_image_bytes:
            raise InputError(f"{name}: a picture of about {size:,} bytes, at most {self._bounds.max_image_bytes:,}", 413)
        return Picture(body)

    def text(self, value: str, name: str) -> str:
        """
        Raises:
            InputError: empty, too long, or no Unicode.
        """
        if not value.strip():
            raise InputError(f"{name}: the text is empty")
        if len(value) > self._bounds.max_text_characters:
            raise InputError(f"{name}: {len(value):,} characters, at most {self._bounds.max_text_characters:,}", 413)
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError(f"{name}: holds a lone surrogate (\\ud800 to \\udfff), which is no text")
        return value

    def classes(self, labels: Sequence[str], templates: Sequence[str]) -> None:
        """
        Raises:
            InputError: an empty label, a template without a place for it, too many or too long prompts.
        """
        for i, template in enumerate(templates):
            if TEMPLATE_MARK not in template:
                raise InputError(f"templates.{i}: has no {TEMPLATE_MARK} where the label goes")
        if len(labels) * len(templates) > self._bounds.max_inputs:
            count = f"{len(labels) * len(templates):,} prompts ({len(labels):,} labels in {len(templates):,} templates)"
            raise InputError(f"labels: {count} in one call, at most {self._bounds.max_inputs:,}: larger sets are named ones", 413)
        for i, label in enumerate(labels):
            if is_data_uri(label):
                raise InputError(f"labels.{i}: a label is a text, not an image")
            self.text(label, f"labels.{i}")
            for template in templates:
                self.text(template.replace(TEMPLATE_MARK, label), f"labels.{i}")


def encoded(vector: Float32[np.ndarray, " d"], encoding: str) -> list[float] | str:
    """A vector as JSON numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def shortened(features: Float32[np.ndarray, "n d"], dimensions: int | None) -> Float32[np.ndarray, "n k"]:
    """The first `dimensions`, of length 1 again, as OpenAI shortens its vectors."""
    if dimensions is None or dimensions == features.shape[1]:
        return features
    short = features[:, :dimensions]
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    cut: Float32[np.ndarray, "n k"] = short / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cut


def is_data_uri(value: str) -> bool:
    return _DATA_URI.match(value) is not None


def _image_of(given: Given) -> str | None:
    match given:
        case str():
            return given if is_data_uri(given) else None
        case ImageInput():
            return given.image
        case TextInput():
            return None


def _text_of(given: Given) -> str:
    return given.text if isinstance(given, TextInput) else str(given)
