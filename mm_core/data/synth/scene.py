"""A scene: a few objects on a background, drawn from a seed. Everything the captions and the questions say is here."""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (38, 84, 200),
    "yellow": (240, 205, 40),
    "purple": (130, 60, 170),
    "orange": (245, 130, 30),
    "pink": (240, 130, 180),
    "brown": (120, 72, 40),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": (0.12, 0.16), "large": (0.19, 0.42)}
"""Least and greatest radius, fractions of the image's side: the words mean the same in every scene."""
EXTENTS = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.88, -0.88, 0.88, 0.88),
    "triangle": (-1.0, -1.0, 1.0, 0.85),
    "star": (-0.951, -1.0, 0.951, 0.809),
    "cross": (-1.0, -1.0, 1.0, 1.0),
    "ring": (-1.0, -1.0, 1.0, 1.0),
}
"""Left, top, right, bottom of each outline around its centre, in radii."""
SHAPES = tuple(EXTENTS)
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 242),
    "grey": (160, 163, 168),
    "black": (28, 28, 32),
    "beige": (224, 208, 176),
}
MAX_OBJECTS = 4
"""One to a quarter of the image."""


@dataclass(frozen=True)
class Thing:
    """One object. Centre and radius are fractions of the image's side."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def position(self) -> str:
        """Where in the image, in words."""
        row = "top" if self.y < 0.4 else "bottom" if self.y > 0.6 else ""
        column = "left" if self.x < 0.4 else "right" if self.x > 0.6 else ""
        return " ".join(word for word in (row, column) if word) or "centre"

    def box(self, side: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels of an image of `side`."""
        left, top, right, bottom = (self.radius * extent for extent in EXTENTS[self.shape])
        return round((self.x + left) * side), round((self.y + top) * side), round((self.x + right) * side), round((self.y + bottom) * side)


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    gradient: bool
    """The background darkens towards the bottom."""

    @property
    def counted(self) -> bool:
        """All objects have one name, so the scene is told by a number."""
        return len(self.things) > 1 and len({thing.name for thing in self.things}) == 1


def draw_scene(draw: random.Random, max_objects: int = MAX_OBJECTS) -> Scene:
    """One to `max_objects` objects; a third of the scenes with several show the same object several times."""
    count = draw.choices(range(1, max_objects + 1), weights=(3, 4, 3, 2)[:max_objects])[0]
    names = _names(draw, count)
    rooms = _rooms(draw, count)
    things = tuple(_thing(draw, shape, colour, room) for (shape, colour), room in zip(names, rooms, strict=True))
    return Scene(things, draw.choice(tuple(BACKGROUNDS)), draw.random() < 0.3)


def draw_single(draw: random.Random, shape: str, colour: str) -> Scene:
    """A scene whose one object is given: for classification."""
    thing = _thing(draw, shape, colour, _rooms(draw, 1)[0])
    return Scene((thing,), draw.choice(tuple(BACKGROUNDS)), draw.random() < 0.3)


def _names(draw: random.Random, count: int) -> list[tuple[str, str]]:
    if count > 1 and draw.random() < 1 / 3:
        return [(draw.choice(SHAPES), draw.choice(tuple(COLOURS)))] * count
    every = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    return draw.sample(every, count)


def _rooms(draw: random.Random, count: int) -> list[tuple[float, float, float]]:
    """Centre and half-width of the free square each object is put into. They never overlap."""
    if count == 1:
        return [(0.5, 0.5, 0.42)]
    quarters = draw.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], count)
    return [(x, y, 0.22) for x, y in quarters]


def _thing(draw: random.Random, shape: str, colour: str, room: tuple[float, float, float]) -> Thing:
    x, y, half = room
    size = draw.choice(tuple(SIZES))
    least, greatest = SIZES[size]
    radius = draw.uniform(least, min(greatest, half))
    slack = half - radius
    return Thing(
        shape=shape,
        colour=colour,
        size=size,
        texture=draw.choices(TEXTURES, weights=(3, 1, 1))[0],
        x=x + draw.uniform(-slack, slack),
        y=y + draw.uniform(-slack, slack),
        radius=radius,
    )
