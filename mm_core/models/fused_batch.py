"""What a model of two towers and a fusion is given and gives back, by the modalities of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mm_core.distributed import GlobalBatch


class Sides(StrEnum):
    """What of a pair is shown."""

    IMAGE = "image"
    TEXT = "text"
    BOTH = "both"

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset({"image", "text"}) if self is Sides.BOTH else frozenset({self.value})


class Task(StrEnum):
    """What is predicted. Each is a loss term of its own."""

    MIM = "mim"
    """Masked patches of an image alone."""
    MLM = "mlm"
    """Masked words of a text alone."""
    MMM_IMAGE = "mmm_image"
    """Masked patches of a pair, both sides of which are masked."""
    MMM_TEXT = "mmm_text"
    """Masked words of such a pair."""
    ITM = "itm"
    """Whether an image and a text, both whole, belong together."""
    CONTRASTIVE = "contrastive"
    """Which image belongs to which text of the global batch."""


@dataclass(frozen=True)
class MaskedImages:
    """b images, m patches of which, over all, are masked."""

    pixels: UInt8[Tensor, "b h w 3"]
    mask: Bool[Tensor, "b n"]
    rows: Int[Tensor, " m"]
    """The masked patches' places in b x n: known on the host, so that nothing waits for the device to count them."""


@dataclass(frozen=True)
class MaskedTexts:
    """b texts, m tokens of which, over all, are to be predicted."""

    input_ids: Int[Tensor, "b l"]
    masked_ids: Int[Tensor, "b l"]
    """As the model sees them."""
    rows: Int[Tensor, " m"]
    """The places of the tokens to predict in b x l."""


@dataclass(frozen=True)
class ImageBatch:
    """One rank's images of a step that has no texts."""

    images: MaskedImages
    whole: GlobalBatch


@dataclass(frozen=True)
class TextBatch:
    """One rank's texts of a step that has no images."""

    texts: MaskedTexts
    whole: GlobalBatch


@dataclass(frozen=True)
class PairBatch:
    """One rank's pairs of a step."""

    images: MaskedImages
    texts: MaskedTexts
    draws: Float[Tensor, " b"]
    """In [0, 1): what a sample's choice of a negative is drawn by."""
    whole: GlobalBatch
    seen: Bool[Tensor, "b 2"] | None = None
    """Which of the masked image and text the fusion sees of each sample; None for both of all. What is not seen has no rows to predict."""
    probed: bool = False
    """Whether the tasks' gradients are to be compared."""


@dataclass(frozen=True)
class LabelledBatch:
    """One rank's samples of known classes; None for a side that is not shown."""

    images: UInt8[Tensor, "b h w 3"] | None
    input_ids: Int[Tensor, "b l"] | None
    labels: Int[Tensor, " b"]


FusedBatch = ImageBatch | TextBatch | PairBatch


@dataclass(frozen=True)
class Predictions:
    """Of m places, or pairs."""

    logits: Float[Tensor, "m c"]
    targets: Int[Tensor, " m"]
    counts: Bool[Tensor, " m"] | None = None
    """Those that count, where not all do."""


@dataclass(frozen=True)
class ClassOutput:
    """What a `LabelledBatch` is taken for."""

    logits: Float[Tensor, "b c"]


@dataclass(frozen=True)
class FusedOutput:
    """What of it a step's modalities give; nothing that no loss reads, as DDP waits for the gradient of all that it holds."""

    predictions: dict[Task, Predictions] = field(default_factory=dict)
    image_features: Float[Tensor, "b d"] | None = None
    """L2-normalised, as the texts'."""
    text_features: Float[Tensor, "b d"] | None = None
    logit_scale: Float[Tensor, ""] | None = None
    guessed: Float[Tensor, "b 2"] | None = None
    """Cosines of what is guessed of image and text, each from the other, with what they are; of a model that guesses."""
    balance: dict[Task, Float[Tensor, ""]] = field(default_factory=dict)
    """What the weight of each task is learned by, where it is."""
    tokens: tuple[Float[Tensor, ...], ...] = ()
    """Of a batch that is probed, what the towers give to all tasks."""
