"""How near mm's decoding is to transformers' own image processor, as a bundle's features see it.

    python benchmarks/preprocessing.py BUNDLE SHARDS... [--images 500]

The cosine between a picture's features from mm's decoder (simplejpeg, torch's bicubic) and from the bundle's `CLIPImageProcessor`
(Pillow). Prints one JSON line with the mean and the least.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import fsspec
import numpy as np
import torch
from PIL import Image

from mm_core.bundle import load_bundle
from mm_core.data.image import decode_centre
from mm_core.data.sample import MAX_MEMBER_BYTES, Group, groups, read_group
from mm_core.data.tar import walk
from pipelines.shards import expand_shards


def pictures(shards: list[str], limit: int) -> list[bytes]:
    found: list[bytes] = []
    for shard in expand_shards(shards):
        with fsspec.open(shard, "rb") as stream:
            for group in groups(walk(stream, max_member_bytes=MAX_MEMBER_BYTES)):
                if isinstance(group, Group) and (image := read_group(group, shard).image):
                    found.append(image)
                if len(found) == limit:
                    return found
    return found


def main() -> None:
    from transformers import CLIPImageProcessor

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--images", type=int, default=500)
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle)
    processor = CLIPImageProcessor.from_pretrained(arguments.bundle)
    cosines: list[float] = []
    data = pictures(arguments.shards, arguments.images)
    for start in range(0, len(data), 50):
        batch = data[start : start + 50]
        ours = bundle.image_features(np.stack([decode_centre(d, bundle.image_size) for d in batch]))
        pixels = processor([Image.open(io.BytesIO(d)).convert("RGB") for d in batch], return_tensors="pt").pixel_values
        with torch.inference_mode():
            theirs = torch.nn.functional.normalize(bundle.model.get_image_features(pixel_values=pixels).pooler_output, dim=1).numpy()
        cosines += (ours * theirs).sum(axis=1).tolist()
    result = {"benchmark": "preprocessing", "bundle": Path(arguments.bundle).name, "images": len(cosines)}
    print(json.dumps(result | {"mean_cosine": round(float(np.mean(cosines)), 5), "least_cosine": round(min(cosines), 5)}))


if __name__ == "__main__":
    main()
