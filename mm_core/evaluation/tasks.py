"""What a model for several tasks has learned of each, on held-out pairs: its loss and accuracy beside those of the best constant answer,
and, for masked words, with the right image, another one and none.

Masks and negatives are drawn from the samples' numbers, so that two models are asked the same; but for the hard negatives of `itm`, which
are those that the model itself finds hard.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int32
from torch import Tensor
from torch.nn import functional

from mm_core.bundle import Bundle
from mm_core.data.decoded import decode_samples
from mm_core.data.masking import Masking, MaskingConfig, uniform
from mm_core.data.permutation import U64, mix
from mm_core.data.reader import IndexReader
from mm_core.data.text import CaptionTokenizer
from mm_core.distributed import GlobalBatch
from mm_core.errors import BundleError
from mm_core.evaluation.encoded import check_skipped
from mm_core.losses.negatives import draw_negatives, text_keys
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import FusedBatch, ImageBatch, MaskedImages, MaskedTexts, PairBatch, Predictions, Task, TextBatch
from mm_core.models.tokenizer import caption_tokenizer, mask_token, special_tokens

_SAMPLES = 64
"""At a time: negatives are drawn among so many."""
_SEED, _DRAW = 11, 12

Ids = Int32[np.ndarray, "b l"]
Hide = Callable[[Ids, Ids, list[str], U64], tuple[Ids, Bool[np.ndarray, "b l"]]]
"""From token ids, the word each is of, the texts and seeds to what the model sees and which tokens it shall predict."""


@dataclass
class _Score:
    """Of one task so far."""

    loss: float = 0.0
    hits: int = 0
    targets: list[Tensor] = field(default_factory=list)

    def add(self, found: Predictions) -> None:
        counted = torch.ones_like(found.targets, dtype=torch.bool) if found.counts is None else found.counts
        logits, targets = found.logits.float()[counted], found.targets[counted]
        self.loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        self.hits += int((logits.argmax(dim=1) == targets).sum())
        self.targets.append(targets.cpu())

    def metrics(self) -> dict[str, float]:
        """`constant_…`: of the answer that would have been best for all places alike."""
        targets = torch.cat(self.targets)
        shares = targets.bincount().double() / len(targets)
        entropy = -float(torch.special.xlogy(shares, shares).sum())
        return {
            "loss": self.loss / len(targets),
            "constant_loss": entropy,
            "accuracy": self.hits / len(targets),
            "constant_accuracy": float(shares.max()),
            "places": float(len(targets)),
        }


@dataclass(frozen=True)
class HeldOut:
    """Pairs, and how they are shown."""

    reader: IndexReader
    ordinals: U64
    tokenizer: CaptionTokenizer
    masking: Masking
    image_size: int


def held_out(bundle: Bundle, reader: IndexReader, ordinals: U64) -> HeldOut:
    """Pairs as a bundle's model takes them, hidden as in the paper: blocks of 16 of 196 patches at least, in proportion.

    Raises:
        BundleError: the model has no such tasks, or was fine-tuned to classify.
        ConfigError: its tokenizer has no mask token.
    """
    if not bundle.is_multimodal:
        raise BundleError(f"{bundle.name} is two towers, which predict no words or patches: --tasks needs a flava model")
    bundle.check_pretrained()
    config, marks = bundle.model.config, special_tokens(bundle.tokenizer)
    grid = bundle.image_size // config.image_config.patch_size
    hidden = MaskingConfig(min_block=max(1, round(grid**2 * 16 / 196)))
    masking = Masking(hidden, grid, mask_id=mask_token(bundle.tokenizer), pad_id=marks.pad, vocab_size=config.text_config.vocab_size)
    return HeldOut(reader, ordinals, caption_tokenizer(bundle.tokenizer, bundle.context_length), masking, bundle.image_size)


@torch.no_grad()
def task_metrics(
    model: Fused, held: HeldOut, device: torch.device, *, hide: Hide | None = None, whole_images: bool = False
) -> dict[str, dict[str, float]]:
    """By task the figures of `_Score.metrics`, `contrastive` among 64 pairs; `itm_uniform`: matching, with any other text of so many;
    `mmm_text_other_image`, `mmm_text_no_image`: masked words beside the image of another sample, and beside none.

    Args:
        hide: which words are hidden; by default as in training.
        whole_images: no patch is hidden.

    Raises:
        DataError: more than a tenth of the samples cannot be decoded.
    """
    scores: dict[str, _Score] = {}
    for batch in _batches(held, device, hide, whole_images):
        shown: dict[str, FusedBatch] = {
            "": batch,
            "image": ImageBatch(batch.images, batch.whole),
            "text": TextBatch(batch.texts, batch.whole),
        }
        for one in shown.values():
            for task, found in model(one).predictions.items():
                if len(found.targets):
                    scores.setdefault(task, _Score()).add(found)
        scores.setdefault("itm_uniform", _Score()).add(_matched(model, batch))
        scores.setdefault("contrastive", _Score()).add(_contrasted(model, batch))
        blind = torch.tensor([[False, True]] * len(batch.draws), device=device)
        others = {
            "mmm_text_other_image": replace(batch, images=replace(batch.images, pixels=batch.images.pixels.roll(1, 0))),
            "mmm_text_no_image": replace(batch, images=replace(batch.images, rows=batch.images.rows[:0]), seen=blind),
        }
        for name, other in others.items():
            if (found := model(other).predictions.get(Task.MMM_TEXT)) is not None:
                scores.setdefault(name, _Score()).add(found)
    return {name: score.metrics() for name, score in scores.items()}


def _contrasted(model: Fused, batch: PairBatch) -> Predictions:
    """Of the batch's texts the one of each image, and of its images the one of each text."""
    images, texts = model.image_features(batch.images.pixels), model.text_features(batch.texts.input_ids)
    logits = model.logit_scale * images @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return Predictions(torch.cat([logits, logits.T]), own.repeat(2))


def _matched(model: Fused, batch: PairBatch) -> Predictions:
    """Each image with its own text, then with one that says something else."""
    pixels, ids = batch.images.pixels, batch.texts.input_ids
    count = len(ids)
    own = torch.arange(count, device=ids.device)
    other = draw_negatives(batch.draws.new_zeros(count, count), own, text_keys(ids), batch.draws)
    belongs = torch.cat([model.match(pixels, ids), model.match(pixels, ids[other.rows])]).clamp(1e-7, 1 - 1e-7)
    labels = torch.ones_like(own).repeat(2)
    labels[count:] = 0
    return Predictions(torch.stack([1 - belongs, belongs], dim=1).log(), labels, torch.cat([torch.ones_like(other.found), other.found]))


def _batches(held: HeldOut, device: torch.device, hide: Hide | None, whole_images: bool) -> Iterator[PairBatch]:
    reasons: list[str] = []
    good = 0
    for start in range(0, len(held.ordinals), _SAMPLES):
        ordinals = held.ordinals[start : start + _SAMPLES]
        decoded = decode_samples(held.reader, ordinals, held.image_size)
        reasons += [reason for reason in decoded.reasons if reason is not None]
        good += len(decoded.images)
        if not len(decoded.images):
            continue
        seeds = mix(_SEED, ordinals[decoded.good])
        texts = [captions[0] for captions, there in zip(decoded.captions, decoded.good, strict=True) if there]
        ids, words = held.tokenizer.with_words(texts)
        masked, hidden = hide(ids, words, texts, seeds) if hide else held.masking.texts(ids, words, seeds)
        patches = held.masking.images(seeds) & (not whole_images)

        def there(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(values)).to(device)

        yield PairBatch(
            MaskedImages(there(decoded.images), there(patches), there(np.flatnonzero(patches))),
            MaskedTexts(there(ids).long(), there(masked).long(), there(np.flatnonzero(hidden))),
            there(uniform(seeds, _DRAW).astype(np.float32)),
            GlobalBatch((len(seeds),)),
        )
    check_skipped(reasons, good, held.reader.index.url)


def hiding(names: Collection[str], tokenizer: CaptionTokenizer, mask_id: int) -> Hide:
    """Hide one of the words `names` in each text that has one, and nothing else."""

    def hide(ids: np.ndarray, words: np.ndarray, texts: list[str], seeds: U64) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.zeros(ids.shape, dtype=bool)
        for row, (text, draw) in enumerate(zip(texts, uniform(seeds, _DRAW), strict=True)):
            if places := [n for n, word in enumerate(tokenizer.words(text)) if word in names]:
                hidden[row] = words[row] == places[int(draw * len(places))]
        return np.where(hidden, mask_id, ids).astype(np.int32), hidden

    return hide
