"""What a codebook says of pictures: some of a run's own, and below each what its entries alone give back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from mm_core.data.decoded import decode_samples
from mm_core.data.reader import IndexReader
from mm_core.models.dvae import DiscreteVae
from pipelines.train.run_data import RunData

_PICTURES, _PER_ROW, _EDGE = 32, 8, 2


def draw_reconstructions(model: DiscreteVae, size: int, data: RunData, path: Path) -> Path:
    """A PNG of up to 32 pictures, evenly spread over what is kept of the first index."""
    reader, kept = IndexReader(data.indexes[0]), data.kept[0].ordinals
    chosen = np.linspace(0, len(kept) - 1, min(_PICTURES, len(kept))).round().astype(np.int64)
    pictures = decode_samples(reader, np.asarray(kept[chosen]), size).images
    said = model.eval().reconstruct(torch.from_numpy(np.array(pictures))).numpy()
    Image.fromarray(_sheet(pictures, said)).save(path)
    return path


def _sheet(above: UInt8[np.ndarray, "n s s 3"], below: UInt8[np.ndarray, "n s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
    size, rows = above.shape[1], -(-len(above) // _PER_ROW)
    cell = size + _EDGE
    sheet = np.full((rows * (2 * cell + _EDGE), _PER_ROW * cell, 3), 255, dtype=np.uint8)
    for number, pair in enumerate(zip(above, below, strict=True)):
        top, left = number // _PER_ROW * (2 * cell + _EDGE), number % _PER_ROW * cell
        for place, picture in enumerate(pair):
            sheet[top + place * cell : top + place * cell + size, left : left + size] = picture
    return sheet
