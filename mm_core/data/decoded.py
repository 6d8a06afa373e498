"""Samples of an index as evaluation and embedding see them: centre crops, every caption, the class; or why there is nothing to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from mm_core.data.image import decode_centre
from mm_core.data.permutation import U64
from mm_core.data.problems import Reason, SampleProblem
from mm_core.data.reader import IndexReader
from mm_core.data.sample import Sample

_DECODERS = 4
"""Threads: the decoder leaves Python's lock while it works."""


@dataclass(frozen=True)
class Decoded:
    """n samples, of which m could be decoded."""

    images: UInt8[np.ndarray, "m size size 3"]
    captions: list[list[str]]
    """[n]; of one that could not be decoded they count for nothing."""
    labels: NDArray[np.int64]
    """[n]; -1 where a sample has no class."""
    reasons: list[str | None]
    """[n]; None where the sample was decoded."""

    @property
    def good(self) -> NDArray[np.bool_]:
        """[n]"""
        return np.array([reason is None for reason in self.reasons], dtype=bool)


def decode_samples(reader: IndexReader, ordinals: U64, size: int, *, threads: ThreadPoolExecutor | None = None) -> Decoded:
    """The samples at `ordinals`, their pictures `size` pixels wide, decoded in `threads` where there are some."""

    def picture(sample: Sample | SampleProblem) -> NDArray[np.uint8] | Reason:
        try:
            if isinstance(sample, SampleProblem):
                raise sample
            if "text" in reader.index.summary.need and not sample.captions:
                raise SampleProblem(Reason.NO_TEXT)
            return decode_centre(sample.image or b"", size)
        except SampleProblem as problem:
            return problem.reason

    samples = reader.read(ordinals)
    found = [*(threads.map(picture, samples) if threads else map(picture, samples))]
    pictures = [one for one in found if not isinstance(one, Reason)]
    read = [None if isinstance(sample, SampleProblem) else sample for sample in samples]
    return Decoded(
        images=np.stack(pictures) if pictures else np.empty((0, size, size, 3), dtype=np.uint8),
        captions=[sample.captions if sample else [] for sample in read],
        labels=np.array([-1 if sample is None or sample.label is None else sample.label for sample in read], dtype=np.int64),
        reasons=[one.value if isinstance(one, Reason) else None for one in found],
    )


def decoded_ahead(reader: IndexReader, blocks: Sequence[U64], size: int) -> Iterator[Decoded]:
    """Each block, the one behind it being read and decoded meanwhile."""
    with ThreadPoolExecutor(_DECODERS) as threads, ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(decode_samples, reader, block, size, threads=threads) for block in blocks[:1]]
        for following in range(1, len(blocks) + 1):
            done = coming.pop()
            if following < len(blocks):
                coming.append(ahead.submit(decode_samples, reader, blocks[following], size, threads=threads))
            yield done.result()
