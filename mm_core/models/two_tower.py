"""Two towers as training calls them: uint8 images and token ids in, normalised features out.

The wrapped transformers model (`CLIPModel`, `SiglipModel`) is the model: what is exported loads with its `from_pretrained` anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_core.models.patch_dropout import drop_patches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class Tower(StrEnum):
    VISION = "vision"
    TEXT = "text"


@dataclass(frozen=True)
class ImageTextBatch:
    """One rank's pairs of a step."""

    images: UInt8[Tensor, "b v h w 3"]
    """v views of each."""
    input_ids: Int[Tensor, "b c l"]
    """c captions of each."""


@dataclass(frozen=True)
class TwoTowerOutput:
    """Features are L2-normalised; `logit_scale` is the factor itself, not its logarithm."""

    image_features: Float[Tensor, "b v d"]
    text_features: Float[Tensor, "b c d"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None = None
    """Of models that were made for the sigmoid loss."""


class TwoTower(nn.Module):
    """A model of two towers, each of which maps its modality into one space by itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: PreTrainedModel, *, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, batch: ImageTextBatch) -> TwoTowerOutput:
        views = self.image_features(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        captions = self.text_features(batch.input_ids.flatten(0, 1)).unflatten(0, batch.input_ids.shape[:2])
        bias = getattr(self.model, "logit_bias", None)
        return TwoTowerOutput(views, captions, self.logit_scale, None if bias is None else bias.reshape(()))

    def image_features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        pixels = normalise(images, self.mean, self.std)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def text_features(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """No attention mask: CLIP's text is causal and pooled at the first EOS, so the padding behind it is never seen; SigLIP sees its
        padding, and was trained with it."""
        return _unit(self.model.get_text_features(input_ids=input_ids).pooler_output)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.model.logit_scale.exp().reshape(())

    def attend_for(self, device: torch.device) -> None:
        """Choose the attention kernel: SDPA, but on a CPU, where the backward of its kernel takes 44 % of a small model's step."""
        self.model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of both towers."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def freeze(self, tower: Tower) -> None:
        """Train the other tower alone, with the temperature (LiT: Zhai et al. 2022, arXiv 2111.07991, freezes the image tower)."""
        names = {Tower.VISION: ("vision_model", "visual_projection"), Tower.TEXT: ("text_model", "text_projection")}[tower]
        for name in names:
            if hasattr(self.model, name):  # SigLIP has no projections
                getattr(self.model, name).requires_grad_(False)

    def drop_patches(self, share: float) -> None:
        """In training, leave a random `share` of an image's patches out."""
        drop_patches(self.model.vision_model.embeddings, share)

    def checkpoint_activations(self) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        for block in self.blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def normalise(images: UInt8[Tensor, "b h w 3"], mean: Float[Tensor, " 3"], std: Float[Tensor, " 3"]) -> Float[Tensor, "b 3 h w"]:
    """uint8 pixels to a tower's input, on the device they are on."""
    return ((images.to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


def _unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """L2-normalised, in fp32 at least: half precision has too few digits for logits of up to 100."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
