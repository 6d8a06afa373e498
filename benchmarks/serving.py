"""An endpoint beside the model itself: throughput, latency, overload, lost copies, and whether vectors are the same.

    python benchmarks/serving.py --recipe clip-vit-b32 --seconds 20

The model has the recipe's shapes and fresh weights. Callers are processes of this machine, so they, HTTP, decoding and the model share its
cores. `direct` decodes and computes in one process, at the batch size that is best for it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from mm_core.bundle import Bundle, load_bundle, write_bundle
from mm_core.data.image import decode_centre
from mm_core.models.family import build_model
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines.recipes import recipe
from pipelines.session import ray_session
from serve.address import free_port
from serve.cli import wanted_models
from serve.client import data_uri
from serve.config import Bound, Compute, Precision, ServeConfig
from serve.run import Server, look_at, start
from serve.store import Folders

_WORDS = ["a", "photo", "of", "two", "small", "red", "circles", "and", "one", "large", "blue", "square", "on", "a", "white", "background"]
_BATCHES = (1, 8, 32)
Make = Callable[[int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="clip-vit-b32")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--parts", default="same,throughput,overload,lost")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_session():
        bundle = load_bundle(made(options.recipe, Path(folder) / "bundle"))
        compute = Compute(precision=Precision(options.precision))
        config = ServeConfig(port=free_port(), compute=compute, bounds=Bound(max_waiting_inputs=128))
        server = start(look_at(wanted_models([f"{folder}/bundle"], ()), config, Folders()))
        try:
            for part in options.parts.split(","):
                print(json.dumps(PARTS[part](server, bundle, options.seconds)), flush=True)
        finally:
            server.stop()


def made(name: str, folder: Path) -> Path:
    run = recipe(name)
    tokenizer = train_bpe([" ".join(_WORDS)], vocab_size=500, context_length=run.joint_model.context_length)
    config = run.joint_model.model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    model = build_model(config, special_tokens(tokenizer))
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe=name, data_fingerprint="0" * 32, metrics={})
    return folder


def photo(seed: int) -> bytes:
    """A JPEG of 400x533 pixels, smooth as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (20, 15, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((400, 533), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def text(seed: int) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.permutation(_WORDS)[: draw.integers(4, 14)])


@dataclass
class Load:
    """What came back of a time of asking."""

    latencies_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0

    def rate(self, inputs: int) -> float:
        return self.statuses[200] * inputs / self.seconds

    def percentile(self, share: float) -> float:
        return round(float(np.percentile(self.latencies_ms, share)), 1) if self.latencies_ms else float("nan")


async def asked(url: str, bodies: Sequence[bytes], callers: int, seconds: float, pause_s: float = 0) -> Load:
    """Callers who each ask again as soon as they are answered, or after a pause."""
    load, end = Load(), time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=callers)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers={"content-type": "application/json"}) as client:

        async def caller(number: int) -> None:
            while time.perf_counter() < end:
                started = time.perf_counter()
                try:
                    answer = await client.post("/v1/embeddings", content=bodies[number % len(bodies)])
                    status = answer.status_code
                except httpx.TransportError:
                    status = 0
                took_ms = (time.perf_counter() - started) * 1e3
                load.statuses[status] += 1
                (load.latencies_ms if status == 200 else load.refused_ms).append(took_ms)
                number += callers
                if pause_s or status != 200:
                    await asyncio.sleep(pause_s)

        started = time.perf_counter()
        await asyncio.gather(*(caller(i) for i in range(callers)))
        load.seconds = time.perf_counter() - started
    return load


def bodies(kind: str, inputs: int, count: int = 16) -> list[bytes]:
    of: dict[str, Callable[[int], str]] = {"text": text, "image": lambda seed: data_uri(photo(seed))}
    made_ = [[of[kind](n * inputs + i) for i in range(inputs)] for n in range(count)]
    return [json.dumps({"input": one, "encoding_format": "base64"}).encode() for one in made_]


def direct(bundle: Bundle, kind: str, seconds: float) -> float:
    """Inputs/s of the model alone, at its best batch size, decoding and tokenising included."""
    torch.set_num_threads(os.cpu_count() or 1)
    photos, texts = [photo(i) for i in range(32)], [text(i) for i in range(32)]
    best = 0.0
    for batch in _BATCHES:
        done, end = 0, time.perf_counter() + seconds / len(_BATCHES)
        started = time.perf_counter()
        while time.perf_counter() < end:
            if kind == "image":
                bundle.image_features(np.stack([decode_centre(data, bundle.image_size) for data in photos[:batch]]))
            else:
                bundle.text_features(texts[:batch])
            done += batch
        best = max(best, done / (time.perf_counter() - started))
    return best


def throughput(server: Server, bundle: Bundle, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"part": "throughput"}
    for kind in ("image", "text"):
        alone = direct(bundle, kind, seconds)
        found[f"{kind}_direct_per_s"] = round(alone, 1)
        for inputs, callers in ((1, 48), (32, 4)):
            some = bodies(kind, inputs)
            asyncio.run(asked(server.url, some, callers, 2))
            full = asyncio.run(asked(server.url, some, callers, seconds))
            rate = full.rate(inputs)
            pause_s = max(0.0, 8 / (rate / inputs / 2) - 1 / (rate / inputs))  # eight callers at half the rate
            half = asyncio.run(asked(server.url, some, 8, seconds, pause_s))
            name = f"{kind}_{inputs}"
            found[f"{name}_per_s"], found[f"{name}_ratio"] = round(rate, 1), round(rate / alone, 3)
            found[f"{name}_half_load_p50_ms"], found[f"{name}_half_load_p99_ms"] = half.percentile(50), half.percentile(99)
    return found


def overload(server: Server, bundle: Bundle, seconds: float) -> dict[str, Any]:
    """Five times the callers that fill it."""
    some, before = bodies("image", 8), memory()
    full = asyncio.run(asked(server.url, some, 16, seconds))
    middle = memory()
    over = asyncio.run(asked(server.url, some, 80, seconds))
    refused = np.array(over.refused_ms or [float("nan")])
    return {
        "part": "overload",
        "saturated_p99_ms": full.percentile(99),
        "saturated_per_s": round(full.rate(8), 1),
        "overloaded_p99_ms": over.percentile(99),
        "overloaded_per_s": round(over.rate(8), 1),
        "statuses": {str(status): count for status, count in sorted(over.statuses.items())},
        "refused_p50_ms": round(float(np.percentile(refused, 50)), 1),
        "refused_p99_ms": round(float(np.percentile(refused, 99)), 1),
        "memory_mb": [round(value / 1e6) for value in (before, middle, memory())],
    }


def lost(server: Server, bundle: Bundle, seconds: float) -> dict[str, Any]:
    """Copies are killed while they are asked; callers try again as `mm.AsyncClient` does."""
    from serve.client import AsyncClient, RefusedError

    images = [photo(i) for i in range(8)]
    expected = bundle.image_features(np.stack([decode_centre(data, bundle.image_size) for data in images]))
    counts: Counter[str] = Counter()

    async def all_of_it() -> None:
        end = time.perf_counter() + 6 * seconds

        async def caller(client: AsyncClient, number: int) -> None:
            while time.perf_counter() < end:
                try:
                    vector = (await client.embed(images[number % 8]))[0]
                    counts["right" if np.abs(vector - expected[number % 8]).max() < 1e-4 else "wrong"] += 1
                except RefusedError:
                    counts["failed"] += 1
                number += 1

        async def killer() -> None:
            for name in ("Encoder", "Preparer", "Encoder"):
                await asyncio.sleep(1.5 * seconds)
                for pid in replicas(name)[:1]:
                    os.kill(pid, signal.SIGKILL)
                    counts[f"killed {name}"] += 1

        async with AsyncClient(server.url, retries=12) as client:
            await asyncio.gather(killer(), *(caller(client, i) for i in range(8)))

    asyncio.run(all_of_it())
    return {"part": "lost", **counts, "success": round(counts["right"] / max(1, counts["right"] + counts["failed"] + counts["wrong"]), 5)}


def same(server: Server, bundle: Bundle, seconds: float) -> dict[str, Any]:
    """Vectors of the endpoint beside those of the code that training and evaluation call."""
    photos, texts = [photo(i) for i in range(48)], [text(i) for i in range(48)]
    here = np.concatenate(
        [bundle.image_features(np.stack([decode_centre(d, bundle.image_size) for d in photos])), bundle.text_features(texts)]
    )
    answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": [*map(data_uri, photos), *texts]}, timeout=120).json()
    there = np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)
    return {"part": "same", "inputs": len(here), "max_difference": float(np.abs(here - there).max())}


PARTS = {"throughput": throughput, "overload": overload, "lost": lost, "same": same}


def replicas(name: str = "") -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ServeReplica:mm" in line and f":{name}" in line:
            found.append(process.pid)
    return found


def memory() -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in replicas())


if __name__ == "__main__":
    main()
