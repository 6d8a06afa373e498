"""What can be said of a scene, all of it true: captions, relations, questions with answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mm_core.data.synth.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
CAPTIONS_PER_SCENE = 5
_MIN_OFFSET = 0.15
"""Objects whose centres differ by less, as a fraction of the side, are not said to be beside or above one another."""
_RELATIONS_ASKED = 3
_PREDICATES: dict[str, Callable[[Thing, Thing], float]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
"""How far each relation holds between two objects."""
_PLACES = {"top": "at the top", "bottom": "at the bottom", "left": "on the left", "right": "on the right"}

_POSITIONS = ("centre", *(f"{row} {column}".strip() for row in ("top", "", "bottom") for column in ("left", "", "right") if row or column))
ANSWERS = [*dict.fromkeys((*NUMBERS, *COLOURS, *BACKGROUNDS, "yes", *SIZES, *TEXTURES, *_POSITIONS))]
"""All that there are; "no" is also the number."""


@dataclass(frozen=True)
class Relation:
    subject: int
    """Place of the object in the scene's list."""
    predicate: str
    object: int


def relations(scene: Scene) -> list[Relation]:
    """All that hold, each with its inverse."""
    return [
        Relation(i, predicate, j)
        for i, a in enumerate(scene.things)
        for j, b in enumerate(scene.things)
        for predicate, distance in _PREDICATES.items()
        if distance(a, b) > _MIN_OFFSET
    ]


def captions(scene: Scene, draw: random.Random) -> list[str]:
    """Five different captions, the fullest first."""
    if scene.counted:
        options = _counted(scene)
    elif len(scene.things) == 1:
        options = _single(scene)
    else:
        options = _several(scene, draw)
    first, rest = options[0], list(dict.fromkeys(options[1:]))
    return [first, *draw.sample(rest, CAPTIONS_PER_SCENE - 1)]


def questions(scene: Scene, draw: random.Random) -> list[dict[str, str]]:
    """Question, answer and kind: count, background, existence, and attributes and relations of objects that one name tells apart."""
    things = scene.things
    absent = draw.choice(sorted({f"{c} {s}" for c in COLOURS for s in SHAPES} - {thing.name for thing in things}))
    shape, colour = draw.choice(SHAPES), draw.choice(tuple(COLOURS))
    asked = [
        _qa("how many objects are there?", NUMBERS[len(things)], "count"),
        _qa(f"how many {_plural(shape)} are there?", NUMBERS[sum(thing.shape == shape for thing in things)], "count"),
        _qa(f"how many {colour} objects are there?", NUMBERS[sum(thing.colour == colour for thing in things)], "count"),
        _qa("what colour is the background?", scene.background, "background"),
        _qa(f"is there {_a(draw.choice(things).name)}?", "yes", "existence"),
        _qa(f"is there {_a(absent)}?", "no", "existence"),
    ]
    shapes = Counter(thing.shape for thing in things)
    for thing in things:
        if shapes[thing.shape] == 1:
            asked.append(_qa(f"what colour is the {thing.shape}?", thing.colour, "colour"))
            asked.append(_qa(f"what size is the {thing.shape}?", thing.size, "size"))
            asked.append(_qa(f"what texture has the {thing.shape}?", thing.texture, "texture"))
            asked.append(_qa(f"where is the {thing.shape}?", thing.position, "position"))
    found = [] if scene.counted else relations(scene)
    for relation in draw.sample(found, min(_RELATIONS_ASKED, len(found))):
        a, b = things[relation.subject].name, things[relation.object].name
        asked.append(_qa(f"is the {a} {relation.predicate} the {b}?", "yes", "relation"))
        asked.append(_qa(f"is the {b} {relation.predicate} the {a}?", "no", "relation"))
    return asked


def _single(scene: Scene) -> list[str]:
    (thing,) = scene.things
    place = _PLACES.get(thing.position, f"in the {thing.position}")
    ground = f"on a {scene.background} background"
    return [
        f"{_a(_full(thing))} {place} {ground}",
        f"{_a(thing.name)} {ground}",
        _a(f"{thing.size} {thing.name}"),
        f"a picture of {_a(thing.name)}",
        f"there is one {thing.shape}, it is {thing.colour}",
        f"one {_full(thing)}",
        f"{_a(thing.name)} {place}",
    ]


def _counted(scene: Scene) -> list[str]:
    number, thing = NUMBERS[len(scene.things)], scene.things[0]
    many = _plural(thing.name)
    return [
        f"{number} {many} on a {scene.background} background",
        f"{number} {many}",
        f"a picture of {number} {many}",
        f"there are {number} {_plural(thing.shape)}, all {thing.colour}",
        f"{_plural(thing.shape)} in {thing.colour}, {number} of them",
        f"{number} {thing.colour} things: {_plural(thing.shape)}",
    ]


def _several(scene: Scene, draw: random.Random) -> list[str]:
    names = [_a(thing.name) for thing in scene.things]
    shuffled = draw.sample(names, len(names))
    thing, others = draw.choice(scene.things), len(names) - 1
    place = _PLACES.get(thing.position, f"in the {thing.position}")
    shapes = [_many(count, shape) for shape, count in Counter(thing.shape for thing in scene.things).items()]
    options = [
        f"{_listed([_a(_full(thing)) for thing in scene.things])} on a {scene.background} background",
        _listed(names),
        f"a picture of {_listed(shuffled)}",
        f"{NUMBERS[len(names)]} things: {_listed(shuffled)}",
        f"{_listed(shapes)} on a {scene.background} background",
        f"{_a(thing.name)} {place} and {_many(others, 'more thing')}",
    ]
    found = relations(scene)
    for relation in draw.sample(found, min(3, len(found))):
        options.append(f"{names[relation.subject]} {relation.predicate} {names[relation.object]}")
    return options


def _full(thing: Thing) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{thing.size} {texture}{thing.name}"


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _many(count: int, name: str) -> str:
    return f"{NUMBERS[count]} {name if count == 1 else _plural(name)}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _qa(question: str, answer: str, kind: str) -> dict[str, str]:
    return {"question": question, "answer": answer, "kind": kind}
