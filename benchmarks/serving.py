"""An endpoint beside the model itself: throughput, latency, overload, lost copies, a moved alias, and whether vectors are the same.

    python -m benchmarks.serving --recipe clip-vit-b32 --seconds 20

The model has the recipe's shapes and fresh weights. The callers are one process of this machine, so they, HTTP, decoding and the model
share its cores: `client_share` is the callers' part of all its processor time. `direct` decodes and computes in one process that has the
machine to itself, with as many torch threads, decoding in as many, at the batch size that is best for it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.load import Load, closed, paced
from mm_core.bundle import Bundle, load_bundle, write_bundle
from mm_core.config import resolve
from mm_core.data.image import decode_centre
from mm_core.models.family import build_model
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.ports import free_port
from pipelines.embed import vectors
from pipelines.recipes import recipe
from pipelines.registry import RegistryModels, register_bundle
from pipelines.session import ray_session
from pipelines.tracking import TrackingConfig, open_client
from serve.cli import wanted_models
from serve.client import AsyncClient, RefusedError, data_uri
from serve.config import Compute, Precision, ServeConfig
from serve.run import look_at, start

_WORDS = ["a", "photo", "of", "two", "small", "red", "circles", "and", "one", "large", "blue", "square", "on", "a", "white", "background"]
_BATCHES = (1, 8, 16, 32, 64)
_GPU_BATCHES = (32, 128, 512)
_MODEL = "served"
_CALLERS = {1: 48, 32: 6}
"""Who together keep it busy, by the inputs of a call."""
_OVERLOAD = 5
_KILL_EVERY_S = 30


@dataclass(frozen=True)
class Bench:
    """A running endpoint and what is known of it."""

    url: str
    bundle: Bundle
    registry: RegistryModels
    folder: Path
    config: ServeConfig
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="clip-vit-b32")
    parser.add_argument("--seconds", type=float, default=20, help="of each throughput, and a sixth of the longer trials")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each copy, and one of the model alone")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of mm serve")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--other", metavar="URL", help="measure this running server instead, e.g. Infinity's, http://127.0.0.1:7997")
    options = parser.parse_args()
    if options.other:
        print(json.dumps({"part": "other"} | beside(options.other, options.seconds)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MM_CACHE"] = f"{temporary}/cache"
        with ray_session():
            run(options, Path(temporary))


def run(options: argparse.Namespace, folder: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifact_location=f"{folder}/artifacts").resolved()
    for seed in (0, 1):
        register_bundle(tracking, name=_MODEL, bundle_folder=made(options.recipe, folder / f"bundle-{seed}", seed), alias="champion")
    registry = RegistryModels(tracking)
    open_client(tracking).set_registered_model_alias(_MODEL, "champion", "1")
    compute = Compute(
        replicas=options.replicas, gpus_per_replica=options.gpus, precision=Precision(options.precision), compile=options.compile
    )
    config, _ = resolve(ServeConfig(port=free_port(), compute=compute), environment={}, overrides=options.set)
    server = start(look_at(wanted_models([f"{_MODEL}=models:/{_MODEL}@champion"], ()), config, registry))
    bundle = load_bundle(folder / "bundle-0", device="cuda" if options.gpus else "cpu")
    bench = Bench(server.url, bundle, registry, folder, config, options.seconds)
    try:
        for part in options.parts.split(","):
            print(json.dumps({"part": part} | PARTS[part](bench)), flush=True)
    finally:
        server.stop()


def made(name: str, folder: Path, seed: int) -> Path:
    run = recipe(name)
    tokenizer = train_bpe([" ".join(_WORDS)], vocab_size=500, context_length=run.joint_model.context_length)
    config = run.joint_model.model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(seed)
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


def bodies(kind: str, inputs: int, count: int = 16, **more: Any) -> list[bytes]:
    of: dict[str, Callable[[int], str]] = {"text": text, "image": lambda seed: data_uri(photo(seed))}
    made_ = [[of[kind](n * inputs + i) for i in range(inputs)] for n in range(count)]
    return [json.dumps({"input": one, "encoding_format": "base64"} | more).encode() for one in made_]


def direct(bundle: Bundle, kind: str, seconds: float) -> tuple[float, int]:
    """Inputs/s of the model alone, decoding and tokenising included, and the batch size that gave it."""
    torch.set_num_threads(os.cpu_count() or 1)
    batches = _BATCHES if bundle.device.type == "cpu" else _GPU_BATCHES
    photos, texts = [photo(i) for i in range(max(batches))], [text(i) for i in range(max(batches))]
    rates = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads, torch.inference_mode():
        for batch in batches:
            done, started = 0, time.perf_counter()
            while (took := time.perf_counter() - started) < seconds / len(batches):
                if kind == "image":
                    bundle.image_features(np.stack(list(threads.map(lambda d: decode_centre(d, bundle.image_size), photos[:batch]))))
                else:
                    ids, lengths = bundle.tokenise.with_lengths(texts[:batch])
                    bundle.towers.text_features(torch.from_numpy(ids[:, : lengths.max()]).long().to(bundle.device)).cpu()
                done += batch
            rates[done / took] = batch
    return max(rates), rates[max(rates)]


def throughput(bench: Bench) -> dict[str, Any]:
    """At saturation, beside the model alone and a plain server; and the latency at half of it."""
    found: dict[str, Any] = {}
    for kind in ("image", "text"):
        rates = [direct(bench.bundle, kind, bench.seconds)]
        runs: dict[str, list[Load]] = {}
        for inputs, callers in _CALLERS.items():
            some, name = bodies(kind, inputs), f"{kind}_{inputs}"
            full = closed(bench.url, some, inputs, callers=callers, seconds=bench.seconds)
            half = paced(bench.url, some, inputs, per_s=full.rate / inputs / 2, seconds=bench.seconds)
            runs[name] = [full, half]
        rates.append(direct(bench.bundle, kind, bench.seconds))
        alone, batch = max(rates)
        found |= {f"{kind}_direct_per_s": round(alone, 1), f"{kind}_direct_batch": batch}
        for name, (full, half) in runs.items():
            found |= {f"{name}_{what}": value for what, value in figures(full).items()} | {f"{name}_ratio": round(full.rate / alone, 3)}
            found |= {f"{name}_half_p50_ms": half.answered(50), f"{name}_half_p99_ms": half.answered(99)}
    return found


def plain(bench: Bench) -> dict[str, Any]:
    """The same callers, of a server without batching."""
    with plain_server(bench.folder / "bundle-0") as url:
        return beside(url, bench.seconds)


def beside(url: str, seconds: float) -> dict[str, Any]:
    """What another server with OpenAI's interface, and Infinity's field for pictures, makes of the same callers."""
    found: dict[str, Any] = {}
    for kind, (inputs, callers) in itertools.product(("image", "text"), _CALLERS.items()):
        some, name = bodies(kind, inputs, modality=kind), f"{kind}_{inputs}"
        full = closed(url, some, inputs, callers=callers, seconds=seconds)
        half = paced(url, some, inputs, per_s=full.rate / inputs / 2, seconds=seconds)
        found |= {f"{name}_{what}": value for what, value in figures(full).items()}
        found |= {f"{name}_half_p50_ms": half.answered(50), f"{name}_half_p99_ms": half.answered(99)}
    return found


def figures(load: Load) -> dict[str, Any]:
    share = load.client_cpu_s / load.seconds / (os.cpu_count() or 1)
    return {"per_s": round(load.rate, 1), "p50_ms": load.answered(50), "p99_ms": load.answered(99), "client_share": round(share, 3)}


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.plain_server", str(folder), str(port)]
    with subprocess.Popen(command, preexec_fn=lambda: os.nice(15)) as process:  # as Ray's workers are
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    httpx.get(f"{url}/readyz")
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def overload(bench: Bench) -> dict[str, Any]:
    """Five times the requests that it can answer, beside as many callers as it takes at a time."""
    some = bodies("image", 1)
    full = closed(bench.url, some, 1, callers=bench.config.bounds.max_requests, seconds=2 * bench.seconds)
    with memory_watched() as used:
        over = paced(bench.url, some, 1, per_s=_OVERLOAD * full.rate, seconds=6 * bench.seconds)
    return {
        "saturated": figures(full),
        "overloaded": figures(over),
        "p99_ratio": round(over.answered(99) / full.answered(99), 2),
        "statuses": {str(status): count for status, count in sorted(over.statuses.items())},
        "refused_p50_ms": over.refused(50),
        "refused_p99_ms": over.refused(99),
        "memory_mb": {"first": used[0], "most": max(used), "last": used[-1]},
    }


def lost(bench: Bench) -> dict[str, Any]:
    """Copies are killed while they are asked; callers try again as `mm.AsyncClient` does by itself."""
    images = [photo(i) for i in range(8)]
    expected = bench.bundle.image_features(np.stack([decode_centre(data, bench.bundle.image_size) for data in images]))
    counts: Counter[str] = Counter()
    kills = max(2, round(12 * bench.seconds / _KILL_EVERY_S))
    end = time.perf_counter() + kills * _KILL_EVERY_S + _KILL_EVERY_S

    async def caller(client: AsyncClient, number: int) -> None:
        for turn in itertools.count(number):
            if time.perf_counter() >= end:
                return
            try:
                vector = (await client.embed(images[turn % 8]))[0]
                counts["right" if np.abs(vector - expected[turn % 8]).max() < 1e-4 else "wrong"] += 1
            except RefusedError as error:
                counts["failed"] += 1
                counts[f"failed with {error.status}"] += 1

    async def killer() -> None:
        for name in itertools.islice(itertools.cycle(("Gateway", "Encoder", "Preparer", "Encoder")), kills):
            await asyncio.sleep(_KILL_EVERY_S)
            for pid in replicas(name)[:1]:
                os.kill(pid, signal.SIGKILL)
                counts[f"killed {name}"] += 1

    async def all_of_it() -> None:
        async with AsyncClient(bench.url) as client:
            await asyncio.gather(killer(), *(caller(client, i) for i in range(8)))

    asyncio.run(all_of_it())
    asked = counts["right"] + counts["wrong"] + counts["failed"]
    return {"success": round(counts["right"] / max(1, asked), 5), **counts}


def alias(bench: Bench) -> dict[str, Any]:
    """Moved to and fro under full load, without trying again."""
    moves = 0
    done = threading.Event()

    def move() -> None:
        nonlocal moves
        client = open_client(bench.registry.tracking)
        while not done.is_set():
            version = 2 - moves % 2
            client.set_registered_model_alias(_MODEL, "champion", str(version))
            while not done.wait(0.5):
                (state,) = httpx.get(f"{bench.url}/readyz", timeout=60).json()["models"]
                if state["answers"] == {f"models:/{_MODEL}/{version}": 100.0}:
                    moves += 1
                    break

    mover = threading.Thread(target=move)
    mover.start()
    try:
        load = closed(bench.url, bodies("image", 1), 1, callers=_CALLERS[1], seconds=6 * bench.seconds, warm_s=0)
    finally:
        done.set()
        mover.join()
    failed = sum(count for status, count in load.statuses.items() if status != 200)
    return {"moves": moves, "answered": load.statuses[200], "failed": failed, "per_s": round(load.rate, 1)}


def same(bench: Bench) -> dict[str, Any]:
    """Vectors of the endpoint, and of `mm embed`, beside those of the code that training and evaluation call."""
    photos, texts = [photo(i) for i in range(48)], [text(i) for i in range(48)]
    pixels = np.stack([decode_centre(one, bench.bundle.image_size) for one in photos])
    here = np.concatenate([bench.bundle.image_features(pixels), bench.bundle.text_features(texts)])
    answer = httpx.post(f"{bench.url}/v1/embeddings", json={"input": [*map(data_uri, photos), *texts]}, timeout=120).json()
    there = np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)
    embedded = vectors(bench.bundle, pixels, [[one] for one in texts])
    stored = np.concatenate([embedded["image"], np.stack([np.frombuffer(one, "<f2") for one in embedded["texts"]])]).astype(np.float32)
    return {
        "inputs": len(here),
        "endpoint_max_difference": float(np.abs(here - there).max()),
        "embed_max_difference": float(np.abs(here - stored).max()),
        "float16_max_difference": float(np.abs(here - here.astype(np.float16).astype(np.float32)).max()),
    }


PARTS = {"same": same, "throughput": throughput, "plain": plain, "overload": overload, "lost": lost, "alias": alias}


def replicas(name: str = "") -> list[int]:
    """Processes of the endpoint, of versions as well as its own: of this program's Ray, not of another's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline()) if process.is_running() else ""
        if line.startswith("ray::ServeReplica:mm") and f":{name}" in line:
            found.append(process.pid)
    return found


@contextmanager
def memory_watched() -> Iterator[list[int]]:
    """Megabytes of all processes of the endpoint together, now and then."""
    used, done = [memory()], threading.Event()

    def watch() -> None:
        while not done.wait(5):
            used.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield used
    finally:
        done.set()
        thread.join()


def memory() -> int:
    return round(sum(psutil.Process(pid).memory_info().rss for pid in replicas()) / 1e6)


if __name__ == "__main__":
    main()
