"""ALIGN beside CLIP on the same shards, clean and with captions that belong to other pictures.

    python -m benchmarks.noisy_captions [--recipes clip-tiny align-tiny] [--noise 0 0.3] [--steps 400]

Drawn scenes; of a copy of them some captions have changed places. Every recipe is trained on each copy for equally many samples, and asked
for the pictures and captions of clean held-out scenes. Prints one JSON line: recall at 1 and 10 of each.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import webdataset

from benchmarks.command import mm
from pipelines.shards import expand_shards


def swap_captions(shards: list[str], folder: Path, share: float, seed: int = 0) -> None:
    """A copy of each shard in which a share of its captions have changed places."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for shard in shards:
        samples: list[dict[str, Any]] = list(webdataset.WebDataset(shard, shardshuffle=False, empty_check=False))
        wrong = draw.sample(range(len(samples)), round(share * len(samples)))
        texts = {place: samples[other]["txt"] for place, other in zip(wrong, wrong[1:] + wrong[:1], strict=True)}
        with webdataset.TarWriter(str(folder / Path(shard).name)) as writer:
            for place, sample in enumerate(samples):
                parts = {name: sample[name] for name in ("__key__", "jpg", "png", "txt") if name in sample}
                writer.write(parts | ({"txt": texts[place]} if place in texts else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["clip-tiny", "align-tiny"])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        mm("data", "synth", f"{folder}/corpus", "--samples", str(arguments.samples))
        common = [f"steps={arguments.steps}", f"storage={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        settings = [word for value in common for word in ("--set", value)]
        for noise in arguments.noise:
            swap_captions(expand_shards([f"{folder}/corpus/train"]), Path(folder, f"noisy-{noise}"), noise)
            index = f"{folder}/index-{noise}"
            mm("data", "index", f"{folder}/noisy-{noise}", "--out", index)
            for recipe in arguments.recipes:
                trained = mm("train", recipe, "--data", index, "--name", f"{recipe}-{noise}", "--workers", "1", *settings)
                retrieval = mm("eval", trained["bundle"], "--retrieval", f"{folder}/corpus/heldout")["retrieval"]
                recalls = {key: round(retrieval[key], 3) for key in ("t2i_r1", "t2i_r10", "i2t_r1", "i2t_r10")}
                found.setdefault(recipe, {})[str(noise)] = recalls | {"samples_per_s": round(trained["samples_per_s"])}
    print(json.dumps({"benchmark": "noisy_captions", "samples": arguments.samples, "steps": arguments.steps} | found))


if __name__ == "__main__":
    main()
