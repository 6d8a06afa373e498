"""A FLAVA that classifies pairs, or images or texts alone: a head on the fusion's class token, trained with all that is below it.

Answers to questions are such classes (Antol et al. 2015, arXiv 1505.00468, section 5: the commonest answers), and so is whether an image
and a text belong together. What is exported is still a `FlavaForPreTraining`; the head lies beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from mm_core.models.fused import Fused
from mm_core.models.fused_batch import ClassOutput, FusedBatch, LabelledBatch, Sides
from mm_core.models.sizes import OPENAI_MEAN, OPENAI_STD
from mm_core.models.two_tower import ImageTextBatch

if TYPE_CHECKING:
    from transformers import FlavaConfig, FlavaForPreTraining

CLASSIFIER = "classifier.safetensors"
"""Of a bundle: the head's weights."""

_UNREAD = (
    "mim_head",
    "mlm_head",
    "itm_head",
    "mmm_image_head",
    "mmm_text_head",
    "flava.image_projection",
    "flava.text_projection",
    "flava.image_model.layernorm",
    "flava.text_model.layernorm",
)
"""Of the class, but read by other tasks alone."""
_UNREAD_WITHOUT = {
    Sides.IMAGE: ("flava.text_model", "flava.text_to_mm_projection"),
    Sides.TEXT: ("flava.image_model", "flava.image_to_mm_projection"),
    Sides.BOTH: (),
}


class ClassHead(nn.Module):
    """From the fusion's class token to logits, by ViLT's layers for questions (Kim et al. 2021, arXiv 2102.03334, its code)."""

    shown: Tensor

    def __init__(self, config: FlavaConfig, num_classes: int, sides: Sides) -> None:
        """`sides`: what it is trained on."""
        super().__init__()
        width: int = config.multimodal_config.hidden_size
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_classes))
        self.sides = sides
        self.register_buffer("shown", torch.tensor([[*Sides].index(sides)]))  # so that a bundle knows

    @property
    def num_classes(self) -> int:
        last = self.layers[-1]
        assert isinstance(last, nn.Linear), "made above"
        return last.out_features

    def forward(self, token: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        logits: Tensor = self.layers(token)
        return logits


class FusedClassifier(Fused):
    """`Fused`, and a head that classifies."""

    def __init__(
        self, model: FlavaForPreTraining, head: ClassHead, *, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD
    ) -> None:
        """What serves neither the head nor the sides that it is trained on is frozen."""
        super().__init__(model, mean=mean, std=std)
        self.head = head
        for name in (*_UNREAD, *_UNREAD_WITHOUT[head.sides]):
            model.get_submodule(name).requires_grad_(False)
        model.flava.logit_scale.requires_grad_(False)
        if (masked := model.flava.image_model.embeddings.mask_token) is not None:
            masked.requires_grad_(False)

    trains_in_parts = False

    def forward(self, batch: LabelledBatch | FusedBatch | ImageTextBatch) -> Any:
        """A `ClassOutput` of labelled samples; of others what `Fused` gives."""
        if isinstance(batch, LabelledBatch):
            shown = {"image": batch.images, "text": batch.input_ids}
            assert {name for name, side in shown.items() if side is not None} == self.head.sides.modalities, "what is read is what it needs"
            return ClassOutput(self.class_logits(batch.images, batch.input_ids))
        return super().forward(batch)

    def class_logits(self, images: UInt8[Tensor, "b h w 3"] | None, input_ids: Int[Tensor, "b l"] | None) -> Float[Tensor, "b c"]:
        """Of pairs, or of images or texts alone."""
        logits: Tensor = self.head(self.multimodal_vectors(images, input_ids))
        return logits

    @property
    def beside(self) -> dict[str, nn.Module]:
        return super().beside | {CLASSIFIER: self.head}


def load_class_head(config: FlavaConfig, folder: Path) -> ClassHead | None:
    """A bundle's; None where it has none."""
    if not (folder / CLASSIFIER).is_file():
        return None
    weights = load_file(folder / CLASSIFIER)
    head = ClassHead(config, len(weights["layers.3.bias"]), [*Sides][int(weights["shown"])])
    head.load_state_dict(weights)
    return head
