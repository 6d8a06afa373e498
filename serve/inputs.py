"""What a caller sends, checked against the bounds before anything is computed; and how a vector goes back."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from serve.config import ServeConfig
from serve.problems import InputError

LABEL_PLACE = "{c}"
"""Where a template takes the label: CLIP_benchmark's mark."""


def checked_inputs(inputs: Sequence[str], config: ServeConfig) -> list[str | bytes]:
    """Texts as they are, images as their bytes, in order.

    Raises:
        InputError: none or too many, or one that `_checked_text` or `checked_image` refuses.
    """
    if not inputs:
        raise InputError("input: the list is empty; give at least one text or image")
    if len(inputs) > config.max_inputs:
        raise InputError(f"input: {len(inputs):,} inputs in one call, at most {config.max_inputs:,}", 413)
    return [
        checked_image(value, f"input.{i}", config) if _is_image(value) else _checked_text(value, f"input.{i}", config)
        for i, value in enumerate(inputs)
    ]


def checked_image(value: str, name: str, config: ServeConfig) -> bytes:
    """The bytes of a data URI; `name` is the field it came in.

    Raises:
        InputError: no data URI, not base64, or too long.
    """
    head, comma, body = value.partition(",")
    if not comma or not _is_image(head) or not head.lower().endswith(";base64"):
        raise InputError(f"{name}: an image is a base64 data URI: data:image/jpeg;base64,…")
    size = len(body) * 3 // 4
    if size > config.max_image_bytes:
        raise InputError(f"{name}: a picture of about {size:,} bytes, at most {config.max_image_bytes:,}", 413)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not valid base64 ({error})") from None


def checked_prompts(labels: Sequence[str], templates: Sequence[str], config: ServeConfig) -> list[str]:
    """Every label in every template, label by label.

    Raises:
        InputError: an empty label, a template without a place for it, too many or too long prompts.
    """
    for i, template in enumerate(templates):
        if LABEL_PLACE not in template:
            raise InputError(f"templates.{i}: has no {LABEL_PLACE} where the label goes")
    if len(labels) * len(templates) > config.max_inputs:
        count = f"{len(labels) * len(templates):,} prompts ({len(labels):,} labels in {len(templates):,} templates)"
        raise InputError(f"labels: {count} in one call, at most {config.max_inputs:,}", 413)
    prompts = []
    for i, label in enumerate(labels):
        if _is_image(label):
            raise InputError(f"labels.{i}: a label is a text, not an image")
        _checked_text(label, f"labels.{i}", config)
        prompts += [_checked_text(template.replace(LABEL_PLACE, label), f"labels.{i}", config) for template in templates]
    return prompts


def encoded(vector: Float32[np.ndarray, " d"], encoding: str) -> list[float] | str:
    """A vector as JSON numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _is_image(value: str) -> bool:
    """A data URI; any other string is a text."""
    return value[:5].lower() == "data:"


def _checked_text(value: str, name: str, config: ServeConfig) -> str:
    if not value.strip():
        raise InputError(f"{name}: the text is empty")
    if len(value) > config.max_text_characters:
        raise InputError(f"{name}: {len(value):,} characters, at most {config.max_text_characters:,}", 413)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{name}: holds a lone surrogate (\\ud800 to \\udfff), which is no text")
    return value
