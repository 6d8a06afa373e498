"""What training sees of an image: drawn from the seed alone, and what the settings say."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from mm_core.data.augment import AugmentConfig, ColourJitterConfig, random_views
from mm_core.data.image import decode_centre

LUMA = np.array([0.299, 0.587, 0.114])


def picture(height: int = 200, width: int = 300) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 60)], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def plain(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


def whole(**changes: object) -> AugmentConfig:
    """Nothing cropped, so that only colours change."""
    return AugmentConfig(crop_area=(1, 1), crop_ratio=(1, 1), **changes)


def test_crops_depend_on_the_seed_alone_and_cover_what_they_say() -> None:
    data, config = picture(), AugmentConfig(crop_area=(0.2, 0.9), horizontal_flip=0.5)
    np.testing.assert_array_equal(random_views(data, 32, config, 7), random_views(data, 32, config, 7))
    crops = [random_views(data, 32, config, seed)[0] for seed in range(40)]
    assert len({crop.tobytes() for crop in crops}) == 40
    flipped = [crop[:, 0, 0].mean() > crop[:, -1, 0].mean() for crop in crops]
    assert 5 < sum(flipped) < 35


def test_views_differ_and_the_first_shows_what_a_single_view_shows() -> None:
    data, config = picture(), AugmentConfig(crop_area=(0.2, 0.9), horizontal_flip=0.5)
    views = random_views(data, 32, config.model_copy(update={"views": 3}), 7)
    assert len({view.tobytes() for view in views}) == 3
    assert np.abs(views[0].astype(int) - random_views(data, 32, config, 7)[0]).mean() < 2  # maybe from another scale of the decoding


def test_settings_that_are_off_draw_nothing_so_crops_stay_what_they_were() -> None:
    data = picture()
    off = AugmentConfig(crop_area=(0.2, 0.9), colour_jitter=ColourJitterConfig(probability=1.0))
    for seed in range(5):
        np.testing.assert_array_equal(random_views(data, 32, off, seed), random_views(data, 32, AugmentConfig(crop_area=(0.2, 0.9)), seed))


def test_grey_is_the_luma_of_the_colours() -> None:
    data = picture(64, 64)
    (grey,), (colour,) = random_views(data, 64, whole(grey=1.0), 1), random_views(data, 64, whole(), 1)
    assert (grey == grey[..., :1]).all()
    assert np.abs(grey[..., 0] - colour @ LUMA).max() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_brightness_scales_and_clips(seed: int) -> None:
    changed = whole(colour_jitter=ColourJitterConfig(probability=1, brightness=0.5))
    dark, light = ((random_views(plain((v, v, v)), 8, changed, seed))[0] for v in (100, 250))
    factor = dark[0, 0, 0] / 100
    assert 0.49 < factor < 1.51
    assert light[0, 0, 0] == pytest.approx(min(255, 250 * factor), abs=2.6)


def test_contrast_is_around_the_mean_and_saturation_around_the_grey() -> None:
    data = picture(64, 64)
    (before,) = random_views(data, 64, whole(), 1)
    luma = before @ LUMA
    for seed in range(5):
        (contrast,) = random_views(data, 64, whole(colour_jitter=ColourJitterConfig(probability=1, contrast=0.3)), seed)
        assert (contrast @ LUMA).mean() == pytest.approx(luma.mean(), abs=1)
        assert abs((contrast @ LUMA).std() / luma.std() - 1) < 0.31
        (saturation,) = random_views(data, 64, whole(colour_jitter=ColourJitterConfig(probability=1, saturation=0.3)), seed)
        assert np.abs(saturation @ LUMA - luma).mean() < 2


def test_hue_turns_colours_by_at_most_what_is_set_and_leaves_grey() -> None:
    config = whole(colour_jitter=ColourJitterConfig(probability=1, hue=0.1))
    turns = []
    for seed in range(30):
        r, g, b = (random_views(plain((180, 90, 90)), 8, config, seed)[0][4, 4] / 255).tolist()
        turns.append((colorsys.rgb_to_hsv(r, g, b)[0] + 0.5) % 1 - 0.5)
    assert max(turns) > 0.05
    assert min(turns) < -0.05
    assert max(map(abs, turns)) < 0.14  # a turn in YIQ's plane is not quite HSV's
    np.testing.assert_allclose(random_views(plain((90, 90, 90)), 8, config, 1)[0], 90, atol=1)


def test_jitter_comes_as_often_as_it_says() -> None:
    config = whole(colour_jitter=ColourJitterConfig(probability=0.3, brightness=0.5))
    (same,) = random_views(plain((100, 100, 100)), 8, whole(), 1)
    changed = sum(not np.array_equal(random_views(plain((100, 100, 100)), 8, config, seed)[0], same) for seed in range(200))
    assert 40 < changed < 80


def test_a_whole_square_is_what_evaluation_sees() -> None:
    data = picture(96, 96)
    np.testing.assert_array_equal(random_views(data, 32, whole(), 5)[0], decode_centre(data, 32))
