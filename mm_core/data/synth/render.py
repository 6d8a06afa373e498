"""A scene as pixels: drawn at three times the size and reduced, so that edges are smooth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mm_core.data.synth.scene import BACKGROUNDS, COLOURS, Scene, Thing

_SUPERSAMPLE = 3
_DARKEN = 0.8
"""How much light a gradient leaves at the bottom; with less, white ends as grey."""
_SHADE = 0.55
"""Stripes and dots are the object's colour, this much darker."""

Points = list[tuple[float, float]]


def render(scene: Scene, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The scene as an RGB image of `side` pixels."""
    full = side * _SUPERSAMPLE
    image = _background(scene, full)
    for thing in scene.things:
        _paint(image, thing, full)
    return np.asarray(image.reduce(_SUPERSAMPLE))


def _background(scene: Scene, full: int) -> Image.Image:
    colour = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32)
    if not scene.gradient:
        return Image.new("RGB", (full, full), BACKGROUNDS[scene.background])
    light = np.linspace(1.0, _DARKEN, full, dtype=np.float32)[:, None]
    column = np.round(light * colour).astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None], full, axis=1))


def _paint(image: Image.Image, thing: Thing, full: int) -> None:
    """Fill the object's outline with its colour and texture."""
    radius = thing.radius * full
    side = math.ceil(2 * radius)
    mask = Image.new("L", (side, side), 0)
    _OUTLINES[thing.shape](ImageDraw.Draw(mask), radius)
    image.paste(_texture(thing, side), (round(thing.x * full - radius), round(thing.y * full - radius)), mask)


def _texture(thing: Thing, side: int) -> Image.Image:
    colour = COLOURS[thing.colour]
    fill = Image.new("RGB", (side, side), colour)
    dark = tuple(round(channel * _SHADE) for channel in colour)
    pen = ImageDraw.Draw(fill)
    step = max(6, side // 5)
    if thing.texture == "striped":
        for at in range(-side, side, step):
            pen.line([(at, 0), (at + side, side)], fill=dark, width=step // 3)
    elif thing.texture == "dotted":
        for i, x in enumerate(range(step // 2, side, step)):
            for y in range(step // 2 if i % 2 else 0, side, step):
                pen.ellipse([x - step // 5, y - step // 5, x + step // 5, y + step // 5], fill=dark)
    return fill


def _circle(pen: ImageDraw.ImageDraw, r: float) -> None:
    pen.ellipse([0, 0, 2 * r, 2 * r], fill=255)


def _square(pen: ImageDraw.ImageDraw, r: float) -> None:
    pen.rectangle([0.12 * r, 0.12 * r, 1.88 * r, 1.88 * r], fill=255)


def _triangle(pen: ImageDraw.ImageDraw, r: float) -> None:
    pen.polygon([(r, 0), (2 * r, 1.85 * r), (0, 1.85 * r)], fill=255)


def _star(pen: ImageDraw.ImageDraw, r: float) -> None:
    corners: Points = []
    for i in range(10):
        reach, angle = (r if i % 2 == 0 else 0.42 * r), math.pi * (i / 5 - 0.5)
        corners.append((r + reach * math.cos(angle), r + reach * math.sin(angle)))
    pen.polygon(corners, fill=255)


def _cross(pen: ImageDraw.ImageDraw, r: float) -> None:
    pen.rectangle([0.68 * r, 0, 1.32 * r, 2 * r], fill=255)
    pen.rectangle([0, 0.68 * r, 2 * r, 1.32 * r], fill=255)


def _ring(pen: ImageDraw.ImageDraw, r: float) -> None:
    pen.ellipse([0, 0, 2 * r, 2 * r], fill=255)
    pen.ellipse([0.55 * r, 0.55 * r, 1.45 * r, 1.45 * r], fill=0)


_OUTLINES: dict[str, Callable[[ImageDraw.ImageDraw, float], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
