"""Held-out samples through both towers, each rank its share, in as many calls of the model on every rank.

A sharded model gathers its weights at each call, so a rank with fewer samples, or none, calls it as often, with a blank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from numpy.typing import NDArray

from mm_core.data.decoded import Decoded, decoded_ahead
from mm_core.data.permutation import U64
from mm_core.data.reader import IndexReader
from mm_core.data.text import CaptionTokenizer
from mm_core.errors import DataError
from mm_core.models.two_tower import ImageTextBatch, TwoTowerOutput
from mm_core.ranks import Ranks

_IMAGES, _TEXTS = 128, 256
"""That go through the model at a time, whatever the size of a training batch."""
MAX_SKIPPED_FRACTION = 0.1

Model = Callable[[ImageTextBatch], TwoTowerOutput]
"""In eval mode. A collective, where it is sharded."""


@dataclass(frozen=True)
class Encoded:
    """Samples that could be decoded, in the order of their index, as features."""

    images: NDArray[np.float32]
    """[n, d], L2-normalised."""
    texts: NDArray[np.float32]
    """[m, d]: all captions of the first sample, then of the next."""
    captions: NDArray[np.int64]
    """[n]: how many each sample has."""
    labels: NDArray[np.int64]
    """[n]; -1 where a sample has no class."""
    logit_scale: float
    logit_bias: float | None
    reasons: list[str] = field(default_factory=list)
    """Of the samples that could not be decoded."""

    @property
    def first_texts(self) -> NDArray[np.float32]:
        """[n, d]: a caption of each."""
        return np.asarray(self.texts[np.cumsum(self.captions) - self.captions])

    @property
    def owners(self) -> NDArray[np.int64]:
        """[m]: the sample that each text is of."""
        return np.repeat(np.arange(len(self.captions)), self.captions)

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "texts", "captions", "labels")}
        return cls(
            **columns, logit_scale=parts[0].logit_scale, logit_bias=parts[0].logit_bias, reasons=[r for p in parts for r in p.reasons]
        )


class LockstepEncoder:
    """Encodes on all ranks of `ranks` at once; every method is a collective."""

    def __init__(self, model: Model, ranks: Ranks, tokenizer: CaptionTokenizer, image_size: int) -> None:
        self._model, self._ranks, self._tokenizer = model, ranks, tokenizer
        self._blank = np.zeros((1, image_size, image_size, 3), dtype=np.uint8)

    def samples(self, reader: IndexReader, ordinals: U64) -> Encoded | None:
        """The samples at `ordinals`, on rank 0; elsewhere None.

        Raises:
            DataError: more than a tenth of them cannot be decoded.
            TrainingError: another rank failed.
        """
        mine, need = ordinals[self._ranks.share(len(ordinals))], reader.index.summary.need
        blocks = decoded_ahead(reader, [mine[i : i + _IMAGES] for i in range(0, len(mine), _IMAGES)], self._blank.shape[1])
        parts = []
        for _ in range(-(-self._ranks.largest_share(len(ordinals)) // _IMAGES)):
            block, error = None, None
            try:
                block = next(blocks, None)
            except Exception as raised:  # whatever it is, the other ranks must hear of it
                error = raised
            self._ranks.agree(error)
            parts.append(self._block(block, texts="text" in need))
        gathered = self._ranks.gather(Encoded.joined(parts))
        return None if gathered is None else Encoded.joined(gathered)

    def _block(self, block: Decoded | None, *, texts: bool) -> Encoded:
        good = np.empty(0, dtype=bool) if block is None else block.good
        captions = [] if block is None else [found for found, seen in zip(block.captions, good, strict=True) if seen and texts]
        ids = self._tokenizer([caption for of_one in captions for caption in of_one])
        images = self._blank[:0] if block is None else block.images
        outputs = self._call(images, ids)
        counts = [len(of_one) for of_one in captions] if texts else [0] * len(images)
        return Encoded(
            images=_joined([output.image_features for output in outputs], len(images)),
            texts=_joined([output.text_features for output in outputs], len(ids)),
            captions=np.array(counts, dtype=np.int64),
            labels=np.empty(0, dtype=np.int64) if block is None else block.labels[good],
            logit_scale=float(outputs[0].logit_scale),
            logit_bias=None if outputs[0].logit_bias is None else float(outputs[0].logit_bias),
            reasons=[] if block is None else [reason for reason in block.reasons if reason is not None],
        )

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[n, d] of this rank's own `texts`."""
        ids = self._tokenizer(texts)
        return _joined([output.text_features for output in self._call(self._blank[:0], ids)], len(ids))

    def _call(self, images: UInt8[np.ndarray, "n h w 3"], ids: Int32[np.ndarray, "m l"]) -> list[TwoTowerOutput]:
        """Both towers at once, the images as views of one sample and the texts as its captions; blanks come last."""
        blank_text = self._tokenizer([""])
        calls = self._ranks.agree(None, max(-(-len(images) // _IMAGES), -(-len(ids) // _TEXTS), 1))
        outputs = []
        for call in range(calls):
            views, captions = images[call * _IMAGES :][:_IMAGES], ids[call * _TEXTS :][:_TEXTS]
            batch = ImageTextBatch(
                torch.from_numpy(views if len(views) else self._blank)[None].to(self._ranks.device),
                torch.from_numpy(captions if len(captions) else blank_text)[None].to(self._ranks.device).long(),
            )
            outputs.append(self._model(batch))
        return outputs


def _joined(features: Sequence[torch.Tensor], count: int) -> NDArray[np.float32]:
    """The first `count` rows of [1, n, d] features: what is behind them is of blanks."""
    return np.concatenate([one[0].float().cpu().numpy() for one in features])[:count]


def check_skipped(reasons: Sequence[str], good: int, url: str) -> None:
    """
    Raises:
        DataError: more than a tenth of the samples are left out, for `reasons`.
    """
    if not good or len(reasons) > MAX_SKIPPED_FRACTION * (good + len(reasons)):
        why = ", ".join(f"{reason} {n:,}" for reason, n in Counter(reasons).most_common())
        raise DataError(
            f"{len(reasons):,} of {good + len(reasons):,} samples of {url} cannot be evaluated, above {MAX_SKIPPED_FRACTION:.0%}: {why}"
        )
