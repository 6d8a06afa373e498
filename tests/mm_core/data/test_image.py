from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mm_core.data.image import decode_centre, decode_whole, read_header
from mm_core.data.problems import Reason, SampleProblem

Picture = np.ndarray


def gradient(height: int = 90, width: int = 120) -> Picture:
    """Smooth, and different along each axis and in each channel, so that any turn or swap shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, np.full_like(x, 60)], axis=2).astype(np.uint8)


def encoded(picture: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def close(found: Picture, expected: Picture, tolerance: float = 3.0) -> bool:
    return bool(np.abs(found.astype(float) - expected.astype(float)).mean() < tolerance)


def reference(picture: Image.Image, size: int) -> Picture:
    """The same centre crop and resize, by Pillow alone."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [24, 48, 90, 128])
def test_centre_is_what_pillow_makes(image_format: str, size: int) -> None:
    """To within the half pixel that a crop of a scaled decode can be off."""
    picture = Image.fromarray(gradient())
    data = encoded(picture, image_format, quality=95)
    assert read_header(data).format == image_format.lower()
    assert close(decode_centre(data, size), reference(picture, size))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = Image.fromarray(gradient(80, 80))
    turns = [None, 0, 1, 3, 5, 4, 2]  # Pillow's transposes that undo orientations 2 … 8
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    assert len(turns) == 7
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert close(decode_centre(encoded(stored, "JPEG", quality=95, exif=exif), 40), reference(upright, 40))


@pytest.mark.parametrize(
    ("make", "image_format"),
    [
        (lambda p: p.convert("L"), "JPEG"),
        (lambda p: p.convert("CMYK"), "JPEG"),
        (lambda p: p.convert("L"), "PNG"),
        (lambda p: p.quantize(64), "PNG"),
        (lambda p: Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257), "PNG"),
    ],
    ids=["grey jpeg", "cmyk jpeg", "grey png", "palette png", "16-bit png"],
)
def test_other_colour_modes_become_rgb(make: Callable[[Image.Image], Image.Image], image_format: str) -> None:
    picture = make(Image.fromarray(gradient()))
    expected = Image.fromarray(gradient())
    if picture.mode in ("L", "I;16"):
        expected = expected.convert("L").convert("RGB")
    assert close(decode_centre(encoded(picture, image_format), 32), reference(expected, 32), 6.0)


def test_alpha_is_laid_over_white() -> None:
    transparent = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert (decode_centre(encoded(transparent, "PNG"), 16) == 255).all()


def test_progressive_jpeg_and_wrong_suffix_are_read_by_content() -> None:
    picture = Image.fromarray(gradient())
    assert close(decode_centre(encoded(picture, "JPEG", progressive=True, quality=95), 32), reference(picture, 32))


def test_a_scaled_decode_shows_the_same_crop() -> None:
    """Large pictures are decoded at 1/2, 1/4 or 1/8; what is seen must not move."""
    picture = Image.fromarray(gradient(1200, 1600))
    data = encoded(picture, "JPEG", quality=95)
    for size in (64, 128, 300, 700):
        assert close(decode_centre(data, size), reference(picture, size), 2.0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_IMAGE),
        (b"not a picture at all", Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff\xe0 broken", Reason.NOT_AN_IMAGE),
        (encoded(Image.fromarray(gradient()), "GIF"), Reason.NOT_AN_IMAGE),
        (encoded(Image.fromarray(gradient()), "PNG")[:200], Reason.UNDECODABLE),
    ],
)
def test_what_is_no_picture_has_a_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(SampleProblem) as caught:
        decode_centre(data, 16)
    assert caught.value.reason is reason


def test_a_bomb_is_refused_by_its_header() -> None:
    data = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    assert len(data) < 100_000
    with pytest.raises(SampleProblem) as caught:
        decode_centre(data, 16)
    assert caught.value.reason is Reason.TOO_MANY_PIXELS


def test_exif_is_found_behind_other_segments() -> None:
    upright = Image.fromarray(gradient(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(upright.rotate(180), "JPEG", quality=95, exif=exif)
    behind = data[:2] + b"\xff\xed" + (8194).to_bytes(2, "big") + bytes(8192) + data[2:]
    assert (decode_centre(behind, 40) == decode_centre(data, 40)).all()
    assert close(decode_centre(behind, 40), reference(upright, 40))


def test_dark_16_bit_grey_stays_dark() -> None:
    dark = Image.fromarray(np.full((20, 20), 200, dtype=np.uint16))
    assert (decode_centre(encoded(dark, "PNG"), 16) <= 1).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("height", "width"), [(90, 120), (800, 90), (40, 30), (3, 900)])
def test_a_whole_picture_keeps_its_shape(image_format: str, height: int, width: int) -> None:
    picture = Image.fromarray(gradient(height, width))
    found = decode_whole(encoded(picture, image_format, quality=95), 64)
    small = min(1.0, 64 / max(height, width))
    expected = picture.resize((max(1, round(width * small)), max(1, round(height * small))), Image.Resampling.BICUBIC)
    assert found.shape == (expected.height, expected.width, 3)
    assert close(found, np.asarray(expected), 6)


def test_a_whole_picture_is_turned_as_its_orientation_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_whole(encoded(Image.fromarray(gradient(40, 80)), "JPEG", exif=exif), 64)
    assert turned.shape == (64, 32, 3)
    with pytest.raises(SampleProblem) as found:
        decode_whole(b"no picture", 64)
    assert found.value.reason is Reason.NOT_AN_IMAGE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (1, 1)], ids=str)
def test_a_turned_picture_one_pixel_wide_is_decoded(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", size, (200, 100, 50)), "JPEG", exif=exif, quality=95)
    assert np.abs(decode_centre(data, 8).reshape(-1, 3).mean(axis=0) - (200, 100, 50)).max() < 4


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_turns_nothing_and_stops_nothing(image_format: str) -> None:
    picture, draw = Image.fromarray(gradient()), np.random.default_rng(0)
    upright = decode_centre(encoded(picture, image_format), 24)
    whole = Image.Exif()
    whole[0x0112], whole[0x010E] = 1, "a camera"
    for length in (4, 5, 8, 14, 20, 30):
        for _ in range(20):
            exif = bytearray(whole.tobytes()[: 6 + length])
            exif[6 + draw.integers(len(exif) - 6)] = draw.integers(256)
            try:
                found = decode_centre(encoded(picture, image_format, exif=bytes(exif)), 24)
            except SampleProblem:
                continue
            assert found.shape == upright.shape
