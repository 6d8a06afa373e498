"""Random views of a training image: crop, flip and colours, drawn from (seed, epoch, sample) alone, whoever reads it and when."""

from __future__ import annotations

import math
import random

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import Field

from mm_core.config import Config
from mm_core.data.image import MAX_PIXELS, Box, decode_boxes
from mm_core.data.permutation import mix

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=np.float32)
_FROM_YIQ = np.linalg.inv(_TO_YIQ).astype(np.float32)


class ColourJitterConfig(Config):
    """Random change of colours: each factor is drawn from [1 - x, 1 + x], the hue from [-x, x] turns."""

    probability: float = Field(default=0.8, ge=0, le=1, description="Of changing an image at all.")
    brightness: float = Field(default=0.0, ge=0, le=1, description="Largest relative change.")
    contrast: float = Field(default=0.0, ge=0, le=1, description="Largest relative change.")
    saturation: float = Field(default=0.0, ge=0, le=1, description="Largest relative change.")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="Largest turn of the colour circle, at most 0.5; 0 where texts name colours.")

    @property
    def is_off(self) -> bool:
        return not (self.probability and (self.brightness or self.contrast or self.saturation or self.hue))


class AugmentConfig(Config):
    """What training sees of an image."""

    crop_area: tuple[float, float] = Field(default=(0.9, 1.0), description="Share of the image's area that a crop takes.")
    crop_ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="Width over height of a crop.")
    horizontal_flip: float = Field(default=0.0, ge=0, le=1, description="Probability; leave 0 where left and right or writing matter.")
    colour_jitter: ColourJitterConfig = ColourJitterConfig()
    grey: float = Field(default=0.0, ge=0, le=1, description="Probability of dropping colour.")
    views: int = Field(default=1, ge=1, le=16, description="Crops of each image; the loss is their mean.")


def random_views(
    data: bytes,
    size: int,
    config: AugmentConfig,
    seed: int,
    *,
    max_pixels: int = MAX_PIXELS,
    out: UInt8[np.ndarray, "views size size 3"] | None = None,
) -> UInt8[np.ndarray, "views size size 3"]:
    """`config.views` views of an image, which is decoded once, into `out` or fresh memory. The first shows the same part whatever their
    number.

    Raises:
        SampleProblem: as `read_header`, or UNDECODABLE.
    """
    draws = [random.Random(seed if view == 0 else int(mix(seed, view))) for view in range(config.views)]

    def choose(width: int, height: int) -> list[Box]:
        return [_random_box(width, height, config, draw) for draw in draws]

    views = decode_boxes(data, size, choose, max_pixels=max_pixels, out=out)
    for view, draw in zip(views, draws, strict=True):
        varied = _vary(view, config, draw)
        if varied is not view:
            view[:] = varied
    return views


def _random_box(width: int, height: int, config: AugmentConfig, draw: random.Random) -> Box:
    """A random resized crop (Szegedy et al. 2015): ten tries, then the largest box of an allowed ratio, as torchvision does."""
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    for _ in range(10):
        area = width * height * draw.uniform(*config.crop_area)
        ratio = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, width - w), draw.randint(0, height - h), w, h
    ratio = min(max(width / height, config.crop_ratio[0]), config.crop_ratio[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _vary(pixels: UInt8[np.ndarray, "h w 3"], config: AugmentConfig, draw: random.Random) -> UInt8[np.ndarray, "h w 3"]:
    """Flip, then colours."""
    if draw.random() < config.horizontal_flip:
        pixels = pixels[:, ::-1]
    jitter = config.colour_jitter
    jitters = not jitter.is_off and draw.random() < jitter.probability
    greys = config.grey > 0 and draw.random() < config.grey
    if not jitters and not greys:
        return pixels
    changes = (jitter.brightness, jitter.contrast, jitter.saturation) if jitters else (0.0, 0.0, 0.0)
    brightness, contrast, saturation = (draw.uniform(1 - x, 1 + x) for x in changes)
    hue = draw.uniform(-jitter.hue, jitter.hue) if jitters else 0.0
    return _recolour(pixels, brightness, contrast, 0.0 if greys else saturation, hue)


def _recolour(
    pixels: UInt8[np.ndarray, "h w 3"], brightness: float, contrast: float, saturation: float, hue: float
) -> UInt8[np.ndarray, "h w 3"]:
    """All four changes as one affine map of RGB, clipped once. Contrast is around the mean grey, hue a turn in YIQ's colour plane.

    torchvision's ColorJitter clips after each change, takes them in random order and turns hue in HSV: the same family of pictures,
    at several times the cost.
    """
    flat = pixels.reshape(-1, 3)
    linear = brightness * _turn(hue) @ _blend(saturation)
    mean_grey = float(_LUMA @ linear @ flat.mean(axis=0, dtype=np.float32)) if contrast != 1 else 0.0
    changed = flat @ (contrast * linear).T.astype(np.float32) + np.float32((1 - contrast) * mean_grey)
    return np.clip(changed + np.float32(0.5), 0, 255).astype(np.uint8).reshape(pixels.shape)


def _blend(saturation: float) -> Float[np.ndarray, "3 3"]:
    """Between a colour's grey (0) and itself (1)."""
    return saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * np.tile(_LUMA, (3, 1))


def _turn(hue: float) -> Float[np.ndarray, "3 3"]:
    """A turn of the colour circle; greys stay."""
    sin, cos = math.sin(2 * math.pi * hue), math.cos(2 * math.pi * hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], dtype=np.float32)
    return _FROM_YIQ @ turn @ _TO_YIQ
