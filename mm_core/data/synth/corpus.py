"""`mm data synth`: scenes as WebDataset shards.

    OUT/train/00000.tar …     .jpg .txt .json
    OUT/heldout/00000.tar …   the same kind, other scenes: for retrieval
    OUT/zeroshot/             CLIP_benchmark's layout; the class of a picture is the colour and shape of its one object

and where they are asked for, of the same scenes, with the names of the classes in classnames.txt:

    OUT/questions/train/…, heldout/…    .jpg .txt .cls: a question, and which answer is right
    OUT/matching/train/…, heldout/…     .jpg .txt .cls: a caption, and whether it is true of the picture

A sample depends on the config, its part and its number alone: the same config gives the same bytes, however many processes draw.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import simplejpeg
from pydantic import Field

from mm_core.config import Config
from mm_core.data.synth.language import ANSWERS, captions, questions, relations
from mm_core.data.synth.render import render
from mm_core.data.synth.scene import COLOURS, MAX_OBJECTS, SHAPES, Scene, draw_scene, draw_single
from mm_core.errors import ConfigError

CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
TEMPLATES = ["a picture of a {c}", "a {c}", "a large {c}", "a small {c}", "a {c} on a white background", "a {c} on a black background"]
MATCHES = ["false", "true"]
_CLASSNAMES = {"zeroshot": CLASSES, "questions": ANSWERS, "matching": MATCHES}
_JPEG_QUALITY = 88


class SynthConfig(Config):
    """How much is made, and how large."""

    samples: int = Field(ge=0, description="Training samples.")
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=96, ge=32, le=1024, description="Side of the pictures, pixels.")
    max_objects: int = Field(default=MAX_OBJECTS, ge=1, le=MAX_OBJECTS, description="Objects in a scene, at most.")
    samples_per_shard: int = Field(default=500, gt=0)
    heldout_samples: int = Field(default=500, ge=0, description="For retrieval; none of them is a training scene.")
    zeroshot_samples: int = Field(default=480, ge=0, description="For classification, the classes equally often.")
    question_samples: int = Field(default=0, ge=0, description="Training scenes with a question each; of the held-out ones then all.")
    matching_samples: int = Field(
        default=0, ge=0, description="Training scenes with a true or false caption; as many held-out ones as above."
    )

    @property
    def parts(self) -> dict[str, int]:
        """Samples of each part that is made, by its folder."""
        found = {"train": self.samples, "heldout": self.heldout_samples}
        for kind, samples in (("questions", self.question_samples), ("matching", self.matching_samples)):
            if samples:
                found |= {f"{kind}/train": samples, f"{kind}/heldout": self.heldout_samples}
        return {part: samples for part, samples in (found | {"zeroshot": self.zeroshot_samples}).items() if samples}


@dataclass(frozen=True)
class _Shard:
    path: Path
    part: str
    """`train`, `heldout` or `zeroshot`: seeds the scenes, so no part repeats another's; or of the first two `questions/…`, `matching/…`."""
    first: int
    last: int


def write_corpus(
    out: Path, config: SynthConfig, *, workers: int = 1, on_progress: Callable[[int], None] = lambda samples: None
) -> list[Path]:
    """Write the whole corpus and return its shards; `on_progress` is told how many samples each finished shard has.

    Raises:
        ConfigError: `out` is a file or a folder that is not empty. A failed run leaves nothing behind.
    """
    existed = out.exists()
    if existed and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; give another folder, or remove it first")
    try:
        shards = _layout(out, config)
        for samples in _write_all(shards, config, workers):
            on_progress(samples)
    except BaseException:
        for path in out.iterdir() if existed else [out]:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return [shard.path for shard in shards]


def write_shard(path: Path, part: str, first: int, last: int, config: SynthConfig) -> int:
    """Write samples [first, last) of a part as one tar, whole or not at all. Returns how many."""
    temporary = path.with_suffix(".tmp")
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, last):
                for name, data in _members(part, number, config):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return last - first


def _write_all(shards: list[_Shard], config: SynthConfig, workers: int) -> Iterator[int]:
    """Sizes of the shards as they are finished. One worker is this process."""
    if workers == 1:
        for shard in shards:
            yield write_shard(shard.path, shard.part, shard.first, shard.last, config)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        running = [pool.submit(write_shard, shard.path, shard.part, shard.first, shard.last, config) for shard in shards]
        for done in as_completed(running):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _layout(out: Path, config: SynthConfig) -> list[_Shard]:
    shards = []
    for part, samples in config.parts.items():
        kind = part.partition("/")[0]
        if part == "zeroshot":
            (out / part / "test").mkdir(parents=True)
            (out / part / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
            (out / part / "test" / "nshards.txt").write_text("1")
            shards.append(_Shard(out / part / "test" / "0.tar", part, 0, samples))
        else:
            (out / part).mkdir(parents=True)
            for number, first in enumerate(range(0, samples, config.samples_per_shard)):
                shards.append(_Shard(out / part / f"{number:05d}.tar", part, first, min(samples, first + config.samples_per_shard)))
        if kind in _CLASSNAMES:
            (out / kind / "classnames.txt").write_text("\n".join(_CLASSNAMES[kind]) + "\n")
    return shards


def _members(part: str, number: int, config: SynthConfig) -> Iterator[tuple[str, bytes]]:
    kind, _, part = part.rpartition("/")
    draw = random.Random(f"{config.seed}/{part}/{number}")
    key = f"{number:08d}"
    if part == "zeroshot":
        label = number % len(CLASSES)
        colour, shape = CLASSES[label].split()
        yield f"{key}.jpg", _jpeg(draw_single(draw, shape, colour), config.image_size)
        yield f"{key}.cls", str(label).encode()
        return
    scene = draw_scene(draw, config.max_objects)
    truth = _truth(scene, f"synth-{config.seed}-{part}-{key}", config.image_size, draw)
    yield f"{key}.jpg", _jpeg(scene, config.image_size)
    if kind:
        text, label = _asked(truth, draw) if kind == "questions" else _claimed(scene, truth, draw, config)
        yield f"{key}.txt", text.encode()
        yield f"{key}.cls", str(label).encode()
        return
    yield f"{key}.txt", truth["captions"][0].encode()
    yield f"{key}.json", json.dumps(truth).encode()


def _asked(truth: dict[str, Any], draw: random.Random) -> tuple[str, int]:
    """A question, and its answer's class."""
    asked = draw.choice(truth["qa"])
    return asked["question"], ANSWERS.index(asked["answer"])


def _claimed(scene: Scene, truth: dict[str, Any], draw: random.Random, config: SynthConfig) -> tuple[str, int]:
    """A caption of the scene, or of one with none of its objects and other shapes; and which."""
    if draw.random() < 0.5:
        return draw.choice(truth["captions"]), MATCHES.index("true")
    names, shapes = {thing.name for thing in scene.things}, sorted(thing.shape for thing in scene.things)
    other = scene
    while not names.isdisjoint(thing.name for thing in other.things) or shapes == sorted(thing.shape for thing in other.things):
        other = draw_scene(draw, config.max_objects)
    return draw.choice(captions(other, draw)), MATCHES.index("false")


def _truth(scene: Scene, uid: str, side: int, draw: random.Random) -> dict[str, Any]:
    return {
        "uid": uid,
        "captions": captions(scene, draw),
        "width": side,
        "height": side,
        "background": {"colour": scene.background, "gradient": scene.gradient},
        "objects": [
            {
                "shape": thing.shape,
                "colour": thing.colour,
                "size": thing.size,
                "texture": thing.texture,
                "position": thing.position,
                "box": thing.box(side),
            }
            for thing in scene.things
        ],
        "relations": [asdict(relation) for relation in relations(scene)],
        "qa": questions(scene, draw),
    }


def _jpeg(scene: Scene, side: int) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(render(scene, side), quality=_JPEG_QUALITY, colorsubsampling="444")
    return data
