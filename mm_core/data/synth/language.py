"""What can be said of a scene, all of it true: captions, relations, questions with answers."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mm_core.data.synth.scene import COLOURS, SHAPES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
CAPTIONS_PER_SCENE = 5
_MIN_OFFSET = 0.15
"""Objects whose centres differ by less, as a fraction of the side, are not said to be beside or above one another."""


@dataclass(frozen=True)
class Relation:
    subject: int
    """Place of the object in the scene's list."""
    predicate: str
    object: int


def relations(scene: Scene) -> list[Relation]:
    """`left of` and `above` of every pair they hold for."""
    found = []
    for i, a in enumerate(scene.things):
        for j, b in enumerate(scene.things):
            if b.x - a.x > _MIN_OFFSET:
                found.append(Relation(i, "left of", j))
            if b.y - a.y > _MIN_OFFSET:
                found.append(Relation(i, "above", j))
    return found


def captions(scene: Scene, draw: random.Random) -> list[str]:
    """Five different captions, the fullest first."""
    if scene.counted:
        options = _counted(scene, draw)
    elif len(scene.things) == 1:
        options = _single(scene.things[0], scene, draw)
    else:
        options = _several(scene, draw)
    first, rest = options[0], options[1:]
    draw.shuffle(rest)
    return list(dict.fromkeys([first, *rest]))[:CAPTIONS_PER_SCENE]


def questions(scene: Scene) -> list[dict[str, str]]:
    """Question, answer and kind: counting, existence, colour, position, background, relation."""
    names = {thing.name for thing in scene.things}
    asked = [_qa("how many objects are there?", NUMBERS[len(scene.things)], "count")]
    asked.append(_qa("what colour is the background?", scene.background, "background"))
    absent = next(f"{c} {s}" for s in SHAPES for c in COLOURS if f"{c} {s}" not in names)
    asked.append(_qa(f"is there {_a(scene.things[0].name)}?", "yes", "existence"))
    asked.append(_qa(f"is there {_a(absent)}?", "no", "existence"))
    for thing in scene.things:
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            asked.append(_qa(f"what colour is the {thing.shape}?", thing.colour, "colour"))
            asked.append(_qa(f"where is the {thing.shape}?", thing.position, "position"))
    if not scene.counted:
        for relation in relations(scene):
            a, b = scene.things[relation.subject].name, scene.things[relation.object].name
            asked.append(_qa(f"is the {a} {relation.predicate} the {b}?", "yes", "relation"))
            asked.append(_qa(f"is the {b} {relation.predicate} the {a}?", "no", "relation"))
    return asked


def _single(thing: Thing, scene: Scene, draw: random.Random) -> list[str]:
    ground = f"on a {scene.background} background"
    return [
        f"{_a(_full(thing))} in the {thing.position} {ground}",
        f"{_a(thing.name)} {ground}",
        f"{_a(f'{thing.size} {thing.name}')}",
        f"a picture of {_a(thing.name)}",
        f"there is one {thing.shape}, it is {thing.colour}",
        f"one {_full(thing)}",
        f"{_a(thing.name)} in the {thing.position}",
    ]


def _counted(scene: Scene, draw: random.Random) -> list[str]:
    number, thing = NUMBERS[len(scene.things)], scene.things[0]
    many = _plural(thing.name)
    ground = f"on a {scene.background} background"
    return [
        f"{number} {many} {ground}",
        f"{number} {many}",
        f"a picture of {number} {many}",
        f"there are {number} {_plural(thing.shape)}, all {thing.colour}",
        f"{_plural(thing.shape)} in {thing.colour}, {number} of them",
        f"{number} {thing.colour} things: {_plural(thing.shape)}",
    ]


def _several(scene: Scene, draw: random.Random) -> list[str]:
    names = [_a(thing.name) for thing in scene.things]
    shuffled = draw.sample(names, len(names))
    options = [
        f"{_listed([_a(_full(thing)) for thing in scene.things])} on a {scene.background} background",
        _listed(names),
        f"a picture of {_listed(shuffled)}",
        f"{NUMBERS[len(names)]} things: {_listed(shuffled)}",
    ]
    for relation in draw.sample(found := relations(scene), min(3, len(found))):
        a, b = names[relation.subject], names[relation.object]
        options.append(f"{a} {relation.predicate} {b}")
    thing = draw.choice(scene.things)
    options.append(f"{_a(thing.name)} in the {thing.position} and {NUMBERS[len(names) - 1]} more {_noun(len(names) - 1)}")
    return options


def _full(thing: Thing) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{thing.size} {texture}{thing.name}"


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _noun(count: int) -> str:
    return "thing" if count == 1 else "things"


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _qa(question: str, answer: str, kind: str) -> dict[str, str]:
    return {"question": question, "answer": answer, "kind": kind}
