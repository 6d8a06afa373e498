"""Images/s that arrive at the ranks of a two-worker TorchTrainer, beside what bounds it and what people use.

    python benchmarks/loader.py SHARDS... [--images 20000] [--runs 5] [--size 224]

ours        mm's stream inside Ray Train, two workers: ranged reads, checks, decoding, tokenising, strict order, shuffled
limit       the same reading and decoding in two plain processes that keep nothing
dataloader  webdataset + Pillow RandomResizedCrop + the same tokenizer in a torch DataLoader with two workers
open_clip   the same with ToTensor and Normalize behind it, as open_clip's transform has; the others leave both to the device

Each is timed after a warm-up of an eighth of the images, so that neither start-up nor what was read ahead during it counts; they are
interleaved. Same crops (0.9 to 1 of the area, as open_clip), same size, bicubic. Prints one JSON line with medians and ratios.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import ray.train
import torch
import webdataset
from PIL import Image
from ray.train.torch import TorchTrainer

from mm_core.data.augment import AugmentConfig, random_views
from mm_core.data.index import Index
from mm_core.data.ledger import Source, compile_kept
from mm_core.data.plan import Plan
from mm_core.data.reader import IndexReader, ReadSpec
from mm_core.data.sample import Sample
from mm_core.data.text import CaptionTokenizer
from mm_core.models.sizes import OPENAI_MEAN, OPENAI_STD
from mm_core.models.tokenizer import caption_tokenizer, train_bpe
from pipelines.batches import Share
from pipelines.index import build_index
from pipelines.session import ray_session
from pipelines.shards import expand_shards
from pipelines.stream import StreamConfig, stream

RANKS, CHUNK, BATCH, CONTEXT, WARM_UP = 2, 16, 256, 32, 8


def make_spec(index: Index, size: int) -> ReadSpec:
    kept = compile_kept(index)
    captions = [c for batch in index.samples(["captions"]) for cs in batch["captions"].to_pylist() for c in cs or ()]
    tokenizer = caption_tokenizer(train_bpe(captions, vocab_size=1024, context_length=CONTEXT), CONTEXT)
    return ReadSpec((Source(index=index.url),), Plan(len(kept), 0, CHUNK, 1, kept.fingerprint), size, AugmentConfig(), tokenizer)


def ours(spec: ReadSpec, images: int, config: StreamConfig | None = None) -> float:
    """Samples after each rank's warm-up, over the time from the first end of one to the last sample."""
    config = config or StreamConfig()

    def worker(settings: dict[str, ReadSpec]) -> tuple[int, float, float]:
        context = ray.train.get_context()
        share = Share(context.get_world_rank(), RANKS, BATCH // CHUNK)
        seen, started = 0, 0.0
        for batch in stream(settings["spec"], share, first_step=0, last_step=images // BATCH, config=config, cpus=1):
            if batch.step < images // BATCH // WARM_UP:
                started = time.time()
                continue
            seen += len(batch.positions)
        counts: list[tuple[int, float, float]] = [(0, 0.0, 0.0)] * RANKS
        torch.distributed.all_gather_object(counts, (seen, started, time.time()))
        total = sum(c[0] for c in counts)
        return total, min(c[1] for c in counts), max(c[2] for c in counts)

    with tempfile.TemporaryDirectory() as storage:
        trainer = TorchTrainer(
            worker,
            train_loop_config={"spec": spec},
            scaling_config=ray.train.ScalingConfig(num_workers=RANKS, resources_per_worker={"CPU": 0, "memory": 1 << 20}),
            run_config=ray.train.RunConfig(storage_path=storage, name="loader"),
        )
        total, first, last = trainer.fit().return_value
    return total / (last - first)


def _limit_process(
    spec: ReadSpec, rank: int, images: int, barrier: multiprocessing.synchronize.Barrier, out: multiprocessing.Queue[tuple[float, float]]
) -> None:
    torch.set_num_threads(1)
    index = Index.open(spec.sources[0].index)
    reader, kept = IndexReader(index), compile_kept(index).ordinals
    share = Share(rank, RANKS, BATCH // CHUNK)
    steps = images // BATCH
    barrier.wait()
    started = time.time()
    for step in range(steps):
        places = spec.plan.locate(share.positions(step, CHUNK)).kept
        for sample in reader.read(np.asarray(kept[places.astype(np.int64)])):
            assert isinstance(sample, Sample)
            random_views(sample.image or b"", spec.image_size, spec.augment, step)
    out.put((started, time.time()))


def limit(spec: ReadSpec, images: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(RANKS), context.Queue()
    processes = [context.Process(target=_limit_process, args=(spec, rank, images, barrier, out)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    times = [out.get() for _ in processes]
    for process in processes:
        process.join()
    return images // BATCH * BATCH / (max(t[1] for t in times) - min(t[0] for t in times))


class PillowCrop:
    """torchvision's RandomResizedCrop, written out with Pillow: the whole picture is decoded, then cropped and resized.

    `normalise`: then ToTensor and Normalize, as open_clip's transform goes on; else pixels stay uint8, as ours do.
    """

    def __init__(self, size: int, tokenizer: CaptionTokenizer, *, normalise: bool) -> None:
        self._size, self._tokenizer, self._normalise = size, tokenizer, normalise
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))

    def image(self, data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        for _ in range(10):
            area = picture.width * picture.height * random.uniform(0.9, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= picture.width and h <= picture.height:
                left, top = random.randint(0, picture.width - w), random.randint(0, picture.height - h)
                break
        else:
            w = h = min(picture.size)
            left, top = (picture.width - w) // 2, (picture.height - h) // 2
        size = (self._size, self._size)
        pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)))
        if not self._normalise:
            return pixels
        tensor = torch.tensor(pixels).permute(2, 0, 1).contiguous().float().div(255)
        return tensor.sub_(self._mean).div_(self._std).numpy()

    def text(self, data: bytes) -> np.ndarray:
        return self._tokenizer([data.decode()])[0]


def dataloader(shards: list[str], spec: ReadSpec, images: int, *, normalise: bool) -> float:
    """As open_clip builds it: shards resampled, samples shuffled in a buffer, batched in the workers."""
    assert spec.tokenizer is not None, "of pairs"
    crop = PillowCrop(spec.image_size, spec.tokenizer, normalise=normalise)
    batch = BATCH // RANKS
    pipeline = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(1000)
        .to_tuple("jpg", "txt")
        .map_tuple(crop.image, crop.text)
        .batched(batch)
    )
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=RANKS, prefetch_factor=4)
    batches = iter(loader)
    for _ in range(max(1, images // WARM_UP // batch)):
        next(batches)
    started, seen = time.perf_counter(), 0
    while seen < images:
        seen += len(next(batches)[0])
    return seen / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--images", type=int, default=20_480)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    shards = expand_shards(arguments.shards)
    with tempfile.TemporaryDirectory() as folder, ray_session():
        spec = make_spec(build_index(shards, str(Path(folder) / "index")), arguments.size)
        runs = []
        for _ in range(arguments.runs):
            theirs = [dataloader(shards, spec, arguments.images, normalise=normalise) for normalise in (False, True)]
            runs.append((ours(spec, arguments.images), limit(spec, arguments.images), *theirs))
    result = {
        "benchmark": "loader",
        "images": arguments.images,
        "size": arguments.size,
        "cpus": os.cpu_count(),
        "ours_images_per_s": round(statistics.median(r[0] for r in runs)),
        "limit_images_per_s": round(statistics.median(r[1] for r in runs)),
        "dataloader_images_per_s": round(statistics.median(r[2] for r in runs)),
        "open_clip_images_per_s": round(statistics.median(r[3] for r in runs)),
        "of_limit": round(statistics.median(r[0] / r[1] for r in runs), 3),
        "times_dataloader": round(statistics.median(r[0] / r[2] for r in runs), 2),
        "times_open_clip": round(statistics.median(r[0] / r[3] for r in runs), 2),
        "runs": [[round(x) for x in r] for r in runs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
