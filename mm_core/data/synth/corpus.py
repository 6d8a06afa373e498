"""`mm data synth`: scenes as WebDataset shards.

    OUT/train/00000.tar …     .jpg .txt .json
    OUT/heldout/00000.tar …   the same kind, other scenes: for retrieval
    OUT/zeroshot/             CLIP_benchmark's layout; the class of a picture is the colour and shape of its one object

A shard depends on (seed, part, number) alone: the same seed gives the same bytes, whoever makes it, alone or beside others.
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

import simplejpeg
from pydantic import Field

from mm_core.config import Config
from mm_core.data.synth.language import captions, questions, relations
from mm_core.data.synth.render import render
from mm_core.data.synth.scene import COLOURS, SHAPES, Scene, draw_scene, draw_single
from mm_core.errors import ConfigError

CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
TEMPLATES = ["a picture of a {c}", "a {c}", "a large {c}", "a small {c}", "a {c} on a white background", "a {c} on a black background"]
_JPEG_QUALITY = 88


class SynthConfig(Config):
    """How much is made, and how large."""

    samples: int = Field(gt=0, description="Training samples.")
    seed: int = Field(default=0, ge=0)
    image_size: int = Field(default=96, ge=32, le=1024, description="Side of the pictures, pixels.")
    samples_per_shard: int = Field(default=500, gt=0)
    heldout_samples: int = Field(default=500, ge=0, description="For retrieval; none of them is a training scene.")
    zeroshot_samples: int = Field(default=480, ge=0, description="For classification, the classes equally often.")


@dataclass(frozen=True)
class _Shard:
    path: Path
    part: str
    """`train`, `heldout` or `zeroshot`: seeds the scenes, so no part repeats another's."""
    first: int
    last: int


def write_corpus(
    out: Path, config: SynthConfig, *, workers: int = 1, on_progress: Callable[[int], None] = lambda samples: None
) -> None:
    """Write the whole corpus; `on_progress` is told how many samples each finished shard has.

    Raises:
        ConfigError: `out` exists and is not empty. A failed run leaves nothing behind.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; give another folder, or remove it first")
    existed = out.exists()
    try:
        shards = _layout(out, config)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            running = [pool.submit(write_shard, shard.path, shard.part, shard.first, shard.last, config) for shard in shards]
            for done in as_completed(running):
                on_progress(done.result())
    except BaseException:
        for path in out.iterdir() if existed and out.exists() else [out]:
            shutil.rmtree(path, ignore_errors=True)
        raise


def write_shard(path: Path, part: str, first: int, last: int, config: SynthConfig) -> int:
    """Write samples [first, last) of a part as one tar, whole or not at all. Returns how many."""
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, last):
            for name, data in _members(part, number, config):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    temporary.replace(path)
    return last - first


def _layout(out: Path, config: SynthConfig) -> list[_Shard]:
    shards = []
    for part, samples in (("train", config.samples), ("heldout", config.heldout_samples)):
        (out / part).mkdir(parents=True)
        for number, first in enumerate(range(0, samples, config.samples_per_shard)):
            shards.append(_Shard(out / part / f"{number:05d}.tar", part, first, min(samples, first + config.samples_per_shard)))
    if config.zeroshot_samples:
        folder = out / "zeroshot"
        (folder / "test").mkdir(parents=True)
        (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
        (folder / "test" / "nshards.txt").write_text("1")
        shards.append(_Shard(folder / "test" / "0.tar", "zeroshot", 0, config.zeroshot_samples))
    return shards


def _members(part: str, number: int, config: SynthConfig) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(f"{config.seed}/{part}/{number}")
    key = f"{number:08d}"
    if part == "zeroshot":
        label = number % len(CLASSES)
        colour, shape = CLASSES[label].split()
        yield f"{key}.jpg", _jpeg(draw_single(draw, shape, colour), config.image_size)
        yield f"{key}.cls", str(label).encode()
        return
    scene = draw_scene(draw)
    said = captions(scene, draw)
    yield f"{key}.jpg", _jpeg(scene, config.image_size)
    yield f"{key}.txt", said[0].encode()
    yield f"{key}.json", json.dumps(_truth(scene, said, f"synth-{config.seed}-{part}-{key}", config.image_size)).encode()


def _truth(scene: Scene, said: list[str], uid: str, side: int) -> dict[str, object]:
    return {
        "uid": uid,
        "captions": said,
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
        "qa": questions(scene),
    }


def _jpeg(scene: Scene, side: int) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(render(scene, side), quality=_JPEG_QUALITY, colorsubsampling="444")
    return data
