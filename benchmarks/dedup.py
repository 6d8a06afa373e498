"""Perceptual deduplication of real photos among which changed copies of some are planted: recall by change and precision at several
distances, and time, beside imagehash's phash with all pairs compared.

A copy counts as found where it and its photo are in one group. Precision: of the samples that are dropped, the share whose group holds
another of the same photo. Photos that are alike by nature count as mistakes; --sheet draws those pairs, to be looked at.

    python benchmarks/dedup.py SHARDS [--copies 100] [--sheet mistakes.png] [--hashes 1000000]
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from mm_core.curation.bands import Bands
from mm_core.curation.components import Groups, grouped
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample
from pipelines.curate.dedup import DedupConfig, Method, dedup_index
from pipelines.curate.score import score_hashes
from pipelines.index import build_index
from pipelines.session import ray_session

DISTANCES = (2, 4, 6, 8, 10, 12)
Change = Callable[[Image.Image, np.random.Generator], tuple[Image.Image, int]]
"""A changed picture, and the quality it is saved at."""


def resized(scale: float) -> Change:
    return lambda image, rng: (image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC), 90)


def brighter(factor: float) -> Change:
    return lambda image, rng: (ImageEnhance.Brightness(image).enhance(factor), 90)


def cropped(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    """A twentieth of width and height gone, from the sides in any shares."""
    width, height = round(image.width * 0.95), round(image.height * 0.95)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height)), 90


def everything(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    for change in (resized(float(rng.choice((0.5, 0.75, 1.5)))), cropped, brighter(float(rng.choice((0.8, 1.2))))):
        image, _ = change(image, rng)
    return image, int(rng.integers(30, 91))


CHANGES: dict[str, Change] = {
    **{f"resize_{scale}": resized(scale) for scale in (0.5, 0.75, 1.5)},
    **{f"quality_{quality}": lambda image, rng, q=quality: (image, q) for quality in (30, 60, 90)},  # type: ignore[misc]
    "crop_5%": cropped,
    "brightness_-20%": brighter(0.8),
    "brightness_+20%": brighter(1.2),
    "all_of_them": everything,
}


def photos_of(shards: str) -> list[bytes]:
    found = []
    for path in sorted(Path(shards).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = ((member, tar.extractfile(member)) for member in tar if member.name.endswith(".jpg"))
            found += [file.read() for _, file in members if file is not None]
    return found


def plant(photos: list[bytes], copies: int, folder: Path) -> tuple[NDArray[np.int64], list[str]]:
    """Shards of all photos and of the copies, mixed. Returns of each sample the photo it shows, and the change, or an empty name."""
    rng = np.random.default_rng(0)
    chosen = iter(rng.permutation(len(photos)))
    samples = [(data, photo, "") for photo, data in enumerate(photos)]
    for name, change in CHANGES.items():
        for photo in (int(next(chosen)) for _ in range(copies)):
            image, quality = change(Image.open(io.BytesIO(photos[photo])).convert("RGB"), rng)
            changed = io.BytesIO()
            image.save(changed, "JPEG", quality=quality)
            samples.append((changed.getvalue(), photo, name))
    order = rng.permutation(len(samples))
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, place in enumerate(order):
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = len(samples[place][0])
            tar.addfile(entry, io.BytesIO(samples[place][0]))
    return np.array([samples[place][1] for place in order]), [samples[place][2] for place in order]


def quality(groups: Groups, photos: NDArray[np.int64], names: list[str]) -> dict[str, Any]:
    """Recall by change, and of all; precision."""
    group = np.full(len(photos), -1)
    group[groups.samples] = groups.groups
    original = {int(photos[sample]): sample for sample, name in enumerate(names) if not name}
    found = {name: [] for name in CHANGES}  # type: dict[str, list[bool]]
    for sample, name in enumerate(names):
        if name:
            found[name].append(bool(group[sample] >= 0 and group[sample] == group[original[int(photos[sample])]]))
    dropped = len(groups.samples) - groups.count
    families = set(zip(groups.groups.tolist(), photos[groups.samples].tolist(), strict=True))
    right = len(groups.samples) - len(families)
    return {
        "recall": round(float(np.mean([one for each in found.values() for one in each])), 4),
        "precision": round(right / max(1, dropped), 4),
        "mistakes": dropped - right,
        "recall_by_change": {name: round(float(np.mean(each)), 3) for name, each in found.items()},
    }


def ours(index: Index, distance: int) -> tuple[Groups, float]:
    started = time.perf_counter()
    dedup_index(index, f"d{distance}", DedupConfig(methods=(Method.PERCEPTUAL,), distance=distance))
    seconds = time.perf_counter() - started
    kept = pa.concat_tables(Ledger(index, f"d{distance}").decisions.tables())["group"].combine_chunks()
    samples = np.flatnonzero(kept.is_valid().to_numpy(zero_copy_only=False))
    return Groups(samples, kept.drop_null().to_numpy().astype(np.int64)), seconds


def theirs(index: Index, samples: int) -> tuple[NDArray[np.uint64], float]:
    """imagehash's 64 bits of every picture."""
    started, reader, found = time.perf_counter(), IndexReader(index), []
    for ordinal in range(samples):
        (sample,) = reader.read(np.array([ordinal], dtype=np.uint64))
        assert isinstance(sample, Sample)
        assert sample.image is not None
        found.append(np.packbits(imagehash.phash(Image.open(io.BytesIO(sample.image))).hash).view(np.uint64)[0])
    return np.array(found), time.perf_counter() - started


def all_pairs(hashes: NDArray[np.uint64], distance: int) -> Groups:
    blocks = []
    for at in range(0, len(hashes), 1024):
        first, second = np.nonzero(np.bitwise_count(hashes[at : at + 1024, None] ^ hashes[None]) <= distance)
        blocks.append(np.stack([first + at, second], axis=1)[first + at < second])
    return grouped(np.concatenate(blocks))


def draw(index: Index, groups: Groups, photos: NDArray[np.int64], path: str) -> None:
    """One row for each group that holds several photos."""
    mixed = [found for group in np.unique(groups.groups) if len(set(photos[found := groups.samples[groups.groups == group]])) > 1]
    sheet = Image.new("RGB", (6 * 132, max(1, len(mixed)) * 132), "white")
    for row, found in enumerate(mixed):
        for column, sample in enumerate(IndexReader(index).read(found[:6].astype(np.uint64))):
            assert isinstance(sample, Sample)
            sheet.paste(Image.open(io.BytesIO(sample.image or b"")).resize((128, 128)), (column * 132, row * 132))
    sheet.save(path)


def joined(samples: int) -> dict[str, float]:
    """Seconds to join made-up hashes of so many samples in one process, six of each, at distance 8; and what all pairs would take."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 2**63, samples, dtype=np.uint64)
    entries = np.concatenate([whole, rng.integers(0, 2**63, 5 * samples, dtype=np.uint64)])
    bands = Bands.fitted(8, len(entries))
    started, pairs = time.perf_counter(), 0
    for band in range(bands.count):
        keys = np.sort(bands.keys(entries, band))
        pairs += sum(len(first) for first, _, _ in bands.pairs(np.sort(bands.keys(whole, band)), keys, band))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    for query in whole[:20]:
        np.count_nonzero(np.bitwise_count(entries ^ query) <= 8)
    return {
        "samples": samples,
        "s": round(seconds, 1),
        "all_pairs_s": round((time.perf_counter() - started) / 20 * samples),
        "bands": bands.count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("--copies", type=int, default=100, help="of each change")
    parser.add_argument("--sheet")
    parser.add_argument("--hashes", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ray_session():
        photos, names = plant(photos_of(arguments.shards), arguments.copies, Path(temporary))
        index = build_index([f"{temporary}/0.tar"], f"{temporary}/index", need=("image",))
        started = time.perf_counter()
        score_hashes(index)
        hash_s, found, join_s = time.perf_counter() - started, {}, {}
        for distance in DISTANCES:
            groups, join_s[distance] = ours(index, distance)
            found[distance] = quality(groups, photos, names)
            if arguments.sheet and distance == 8:
                draw(index, groups, photos, arguments.sheet)
        hashes, imagehash_s = theirs(index, len(photos))
        started = time.perf_counter()
        compared = {distance: quality(all_pairs(hashes, distance), photos, names) for distance in DISTANCES}
        pairs_s = (time.perf_counter() - started) / len(DISTANCES)
    result = {
        "benchmark": "dedup",
        "samples": len(photos),
        "copies": sum(map(bool, names)),
        "mm": {"hash_s": round(hash_s, 1), "join_s": {d: round(s, 1) for d, s in join_s.items()}, "at_distance": found},
        "imagehash": {"hash_s": round(imagehash_s, 1), "all_pairs_s": round(pairs_s, 2), "at_distance": compared},
    }
    print(json.dumps(result | ({"join": joined(arguments.hashes)} if arguments.hashes else {})))


if __name__ == "__main__":
    main()
