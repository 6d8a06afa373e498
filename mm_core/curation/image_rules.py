"""Rules about pictures that the index's columns answer: no byte of a picture is read."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from pydantic import Field

from mm_core.curation.rows import Rows
from mm_core.curation.rule import Judgement, Rule, SampleRule


class ShorterSide(SampleRule):
    """The shorter side of the picture, pixels. DataComp's basic filter keeps 200 and more."""

    rule: Literal["shorter_side"] = "shorter_side"
    modality = "image"
    columns = ("width", "height")

    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        return np.minimum(rows.numbers("width"), rows.numbers("height"))


class AspectRatio(SampleRule):
    """The longer side divided by the shorter. DataComp's basic filter keeps up to 3."""

    rule: Literal["aspect_ratio"] = "aspect_ratio"
    modality = "image"
    columns = ("width", "height")

    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        width, height = rows.numbers("width"), rows.numbers("height")
        return np.maximum(width, height) / np.minimum(width, height)


class Pixels(SampleRule):
    """Width times height. A cap keeps out pictures that take long to decode."""

    rule: Literal["pixels"] = "pixels"
    modality = "image"
    columns = ("width", "height")

    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        return rows.numbers("width") * rows.numbers("height")


class BytesPerPixel(SampleRule):
    """Bytes of the encoded picture for each of its pixels. Little is a plain surface or heavy compression (a photograph has 0.1 to 0.5)."""

    rule: Literal["bytes_per_pixel"] = "bytes_per_pixel"
    modality = "image"
    columns = ("width", "height", "members")

    def measure(self, rows: Rows) -> Float[np.ndarray, " rows"]:
        return rows.image_bytes / (rows.numbers("width") * rows.numbers("height"))


class ImageFormat(Rule):
    """The picture's format, from its bytes and not from its name."""

    rule: Literal["image_format"] = "image_format"
    modality = "image"
    columns = ("image_format",)
    formats: tuple[Literal["jpeg", "png", "webp"], ...] = Field(min_length=1, description="Those that are kept.")
    """Those that are kept."""

    def judge(self, rows: Rows) -> Judgement:
        found = rows.table["image_format"].combine_chunks()
        keep = pc.is_in(found, pa.array(self.formats)).to_numpy(zero_copy_only=False)
        return Judgement(keep, keep.astype(np.float64), found)
