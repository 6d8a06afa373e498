"""The towers as the endpoint computes them, in each precision: inputs for a second of one core, and how far vectors are from fp32's.

    python -m benchmarks.precision --recipe clip-vit-b32

Shapes are the recipe's, weights fresh. One thread, whose own time is counted, so that other work on the machine matters little. `int8` is
torch's own dynamic quantisation of linear layers, which the endpoint does not offer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.serving import made, photo, text
from mm_core.data.image import decode_centre
from serve.config import Compute, Precision
from serve.encoder import Encoder
from serve.store import Folders

_BATCHES = (1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="clip-vit-b32")
    parser.add_argument("--seconds", type=float, default=4, help="of a core, for each tower and batch size")
    parser.add_argument("--modes", default="fp32,bf16,int8,fp32:compile,bf16:compile")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(made(options.recipe, Path(temporary) / "bundle", seed=0))
        references: dict[str, np.ndarray] = {}
        for mode in options.modes.split(","):
            precision, _, compiled = mode.partition(":")
            encoder = encoder_of(folder, precision, bool(compiled))
            print(json.dumps({"mode": mode} | measured(encoder, options.seconds, references)), flush=True)


def encoder_of(folder: str, precision: str, compiled: bool) -> Encoder:
    known = Precision(precision) if precision != "int8" else Precision.FP32
    encoder = Encoder(folder, Compute(precision=known, compile=compiled), Folders())
    torch.set_num_threads(1)
    if precision == "int8":
        torch.ao.quantization.quantize_dynamic(encoder._bundle.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    return encoder


def measured(encoder: Encoder, seconds: float, references: dict[str, np.ndarray]) -> dict[str, float]:
    """Of both towers at each batch size; the first mode's vectors are what the others are compared with."""
    bundle, found = encoder._bundle, dict[str, float]()
    photos = np.stack([decode_centre(photo(seed), bundle.image_size) for seed in range(max(_BATCHES))])
    ids, lengths = bundle.tokenise.with_lengths([text(seed) for seed in range(max(_BATCHES))])
    calls: dict[str, Callable[[int], np.ndarray]] = {
        "image": lambda batch: np.concatenate(encoder._image_vectors([photos[:batch]])),
        "text": lambda batch: np.concatenate(encoder._text_vectors([(ids[:batch], lengths[:batch])])),
    }
    for kind, call in calls.items():
        for batch in _BATCHES:
            started = time.perf_counter()
            vectors = call(batch)
            found[f"{kind}_{batch}_first_s"] = round(time.perf_counter() - started, 2)
            done, started = 0, time.thread_time()
            while (took := time.thread_time() - started) < seconds:
                vectors = call(batch)
                done += batch
            found[f"{kind}_{batch}_per_core_s"] = round(done / took, 1)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        beside = references.setdefault(kind, unit)
        found[f"{kind}_least_cosine"] = round(float((unit * beside).sum(1).min()), 5)
        found[f"{kind}_max_difference"] = float(np.abs(unit - beside).max())
    return found


if __name__ == "__main__":
    main()
