"""Image bytes to uint8 pixels: one decoder for training, evaluation and serving.

The header is checked before anything is decoded. JPEG goes through simplejpeg at the smallest power-of-two scale that still
covers the output; PNG and WebP through Pillow with an allowlist. EXIF orientation is applied, alpha is laid over white.
Resizing is bicubic with antialiasing (torch's uint8 kernel, within one grey level of Pillow's); torch is imported for it alone, so that
an index, which reads headers, starts quickly.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from mm_core.data.problems import Reason, SampleProblem

MAX_PIXELS = 25_000_000
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_BLOCK = 8
"""Pixels of the side of JPEG's blocks."""

Box = tuple[int, int, int, int]
"""left, top, width, height in pixels of the oriented image."""


@dataclass(frozen=True)
class ImageHeader:
    format: str
    """`jpeg`, `png` or `webp`: from the bytes, whatever the suffix says."""
    width: int
    height: int
    """As stored, before EXIF orientation."""
    colour: str


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Format and size from the header alone.

    Raises:
        SampleProblem: EMPTY_IMAGE, NOT_AN_IMAGE or TOO_MANY_PIXELS.
    """
    if not data:
        raise SampleProblem(Reason.EMPTY_IMAGE, "0 bytes")
    try:
        if data[:2] == b"\xff\xd8":
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            header = ImageHeader("jpeg", width, height, colour)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound is below
                with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as picture:
                    header = ImageHeader(str(picture.format).lower(), *picture.size, picture.mode)
    except Image.DecompressionBombError as error:
        raise SampleProblem(Reason.TOO_MANY_PIXELS, str(error)) from None
    except (ValueError, OSError, SyntaxError, KeyError) as error:  # KeyError: simplejpeg, of a damaged colour space
        raise SampleProblem(Reason.NOT_AN_IMAGE, f"starts with {data[:8]!r}: {error}") from None
    if header.width * header.height > max_pixels:
        raise SampleProblem(Reason.TOO_MANY_PIXELS, f"{header.width}x{header.height} is above {max_pixels:,} pixels")
    return header


def decode_centre(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "size size 3"]:
    """Evaluation and serving: the largest centred square, resized to `size`.

    Raises:
        SampleProblem: as `read_header`, or UNDECODABLE.
    """

    def centre(width: int, height: int) -> list[Box]:
        side = min(width, height)
        return [((width - side) // 2, (height - side) // 2, side, side)]

    return decode_boxes(data, size, centre, max_pixels=max_pixels)[0]


def decode_luma(data: bytes, side: int, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w"]:
    """The brightness of the whole picture, its shorter side at most `side` pixels. Valid until this thread's next decoding.

    Raises:
        SampleProblem: as `read_header`, or UNDECODABLE.
    """
    header = read_header(data, max_pixels=max_pixels)
    shorter = min(header.width, header.height)
    try:
        if header.format == "jpeg" and header.colour not in ("CMYK", "YCCK"):
            luma = _decode_jpeg(data, header, shorter // side, grey=True)[..., 0]
        else:
            luma = np.asarray(Image.fromarray(_decode_pillow(data)).convert("L"))
    except (ValueError, OSError, SyntaxError, KeyError, MemoryError) as error:
        raise SampleProblem(Reason.UNDECODABLE, f"{header.format} {header.width}x{header.height}: {error}") from None
    if shorter > side:
        size = (max(1, round(header.width * side / shorter)), max(1, round(header.height * side / shorter)))
        luma = np.asarray(Image.fromarray(luma).resize(size, Image.Resampling.BICUBIC))
    return _orient(luma, _orientation(data, header.format))


def decode_whole(data: bytes, side: int, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """The whole picture, small, for people to look at: its longer side is at most `side` pixels.

    Raises:
        SampleProblem: as `read_header`, or UNDECODABLE.
    """
    header = read_header(data, max_pixels=max_pixels)
    longer = max(header.width, header.height)
    try:
        if header.format == "jpeg" and header.colour not in ("CMYK", "YCCK"):
            thin = min(header.width, header.height) // _BLOCK  # what pads the blocks of a thin one would show
            decoded = _decode_jpeg(data, header, min(longer // side, thin))
            pixels = np.empty((*decoded.shape[:2], 3), dtype=np.uint8)
            _pack(decoded, pixels)
        else:
            pixels = _decode_pillow(data)
    except (ValueError, OSError, SyntaxError, KeyError, MemoryError) as error:
        raise SampleProblem(Reason.UNDECODABLE, f"{header.format} {header.width}x{header.height}: {error}") from None
    if longer > side:
        size = (max(1, round(header.width * side / longer)), max(1, round(header.height * side / longer)))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return _orient(pixels, _orientation(data, header.format))


def decode_boxes(
    data: bytes,
    size: int,
    choose: Callable[[int, int], Sequence[Box]],
    *,
    max_pixels: int = MAX_PIXELS,
    out: UInt8[np.ndarray, "boxes size size 3"] | None = None,
) -> UInt8[np.ndarray, "boxes size size 3"]:
    """Parts of an image, each resized to `size`, out of one decoding.

    Args:
        choose: from the oriented image's width and height, the boxes.
        out: where they are written, if not into fresh memory.

    Raises:
        SampleProblem: as `read_header`, or UNDECODABLE.
    """
    header = read_header(data, max_pixels=max_pixels)
    orientation = _orientation(data, header.format)
    turned = orientation >= 5
    width, height = (header.height, header.width) if turned else (header.width, header.height)
    boxes = choose(width, height)
    try:
        if header.format == "jpeg" and header.colour not in ("CMYK", "YCCK"):
            pixels = _decode_jpeg(data, header, min(min(box[2:]) for box in boxes) // size)
        else:
            pixels = _decode_pillow(data)
    except (ValueError, OSError, SyntaxError, KeyError, MemoryError) as error:
        raise SampleProblem(Reason.UNDECODABLE, f"{header.format} {width}x{height}: {error}") from None
    oriented = _orient(pixels, orientation)
    out = np.empty((len(boxes), size, size, 3), dtype=np.uint8) if out is None else out
    for part, box in zip(out, boxes, strict=True):
        _resize(oriented, (width, height), box, part)
    return out


def _decode_jpeg(data: bytes, header: ImageHeader, spare: int, *, grey: bool = False) -> UInt8[np.ndarray, "h w c"]:
    """`spare` is how many times the crop covers the output; `grey` decodes the luma alone.

    Only 1/2, 1/4 and 1/8 have a SIMD inverse DCT: other scales are slower than a full decode (measured: 980 against 1,500 images/s at 5/8).
    Colours come with a fourth, unused byte: libjpeg-turbo writes such pixels in a sixth less time than three bytes.
    """
    factor = next((f for f in (8, 4, 2) if f <= spare), 1)
    height, width = -(-header.height // factor), -(-header.width // factor)
    return simplejpeg.decode_jpeg(
        data,
        "GRAY" if grey else "RGBX",
        fastdct=True,
        fastupsample=True,
        min_height=height if factor > 1 else 0,
        min_width=width if factor > 1 else 0,
        min_factor=factor,
        buffer=_scratch(height * width * (1 if grey else 4)),
        strict=False,
    )


_MAX_SCRATCH_BYTES = 32 << 20
_threads = threading.local()


def _scratch(size: int) -> UInt8[np.ndarray, size] | None:
    """This thread's buffer for decoded pixels, valid until its next call. Fresh memory for every picture costs as much in page
    faults as the decoding itself (1.05 against 0.6 ms at 400x533)."""
    if size > _MAX_SCRATCH_BYTES:
        return None
    buffer: UInt8[np.ndarray, size] | None = getattr(_threads, "scratch", None)
    if buffer is None or len(buffer) < size:
        _threads.scratch = buffer = np.empty(size, dtype=np.uint8)
    return buffer


def _decode_pillow(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as picture:
        if picture.mode.startswith("I"):  # 16 bits
            grey = np.asarray(picture, dtype=np.float64) * (255 / 65535)
            return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            white = Image.new("RGBA", layer.size, "white")
            return np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
        return np.asarray(picture.convert("RGB"))


def _orientation(data: bytes, image_format: str) -> int:
    """EXIF orientation 1 to 8; looked for only where an EXIF block is, since parsing costs as much as a small decode."""
    if image_format == "jpeg" and not _has_exif(data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as picture:
            value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's EXIF parser raises whatever the bytes lead it to: struct.error, EOFError, TypeError, …
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _has_exif(jpeg: bytes) -> bool:
    """Whether one of the segments before the picture's data is an EXIF block; nothing is parsed."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and jpeg[at + 1] != 0xDA:
        if jpeg[at + 1] == 0xE1 and jpeg[at + 4 : at + 8] == b"Exif":
            return True
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _orient(pixels: UInt8[np.ndarray, "h w *c"], orientation: int) -> UInt8[np.ndarray, "h2 w2 *c"]:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _resize(pixels: UInt8[np.ndarray, "h w c"], full: tuple[int, int], box: Box, out: UInt8[np.ndarray, "size size 3"]) -> None:
    """Crop `box`, given in pixels of the `full` (width, height), out of the decoded image, which may be smaller, and fill `out` with it.
    Of c channels the first three count."""
    size = len(out)
    height, width = pixels.shape[:2]
    left, top = min(width - 1, round(box[0] * width / full[0])), min(height - 1, round(box[1] * height / full[1]))
    w = max(1, min(width - left, round(box[2] * width / full[0])))
    h = max(1, min(height - top, round(box[3] * height / full[1])))
    crop = pixels[top : top + h, left : left + w]
    if (w, h) == (size, size):
        _pack(crop, out)
        return
    import torch

    # A copy, as torch takes no negative strides, which a turned picture of one pixel's width keeps where it is contiguous otherwise.
    # The batch axis first: only then are the strides channels-last ones, for which torch has a kernel twice as fast.
    channels_last = torch.from_numpy(crop.copy())[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(channels_last, (size, size), mode="bicubic", antialias=True)
    _pack(resized[0].permute(1, 2, 0).numpy(), out)


def _pack(pixels: UInt8[np.ndarray, "h w c"], out: UInt8[np.ndarray, "h w 3"]) -> None:
    """Fill `out` with the first three channels, one by one: a quarter of the time of copying them at once (0.04 against 0.18 ms)."""
    for channel in range(3):
        out[..., channel] = pixels[..., channel]
