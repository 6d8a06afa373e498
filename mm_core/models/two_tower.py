"""Two towers as training calls them: uint8 images and token ids in, normalised features out.

The wrapped transformers model (`CLIPModel`, `SiglipModel`, `AlignModel`, `VisionTextDualEncoderModel`) is the model: what is exported loads
with its `from_pretrained` anywhere. Where these differ, this class knows.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from mm_core.errors import ConfigError
from mm_core.models.batch_norm import batch_norms
from mm_core.models.blocks import checkpoint_blocks, compile_blocks, transformer_blocks
from mm_core.models.logit_scale import scale_parameter
from mm_core.models.patch_dropout import drop_patches
from mm_core.models.patch_product import multiply_patches
from mm_core.models.sizes import OPENAI_MEAN, OPENAI_STD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNMASKED = ("clip_text_model", "siglip_text_model")
"""Text towers, by `model_type`, that take no attention mask: CLIP's is causal and pooled at the first end mark, so the padding behind it is
never seen; SigLIP's sees its padding, and was trained with it."""


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

    trains_in_parts = False
    """Every step trains all that is trained."""

    def __init__(self, model: PreTrainedModel, *, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD) -> None:
        super().__init__()
        self.model = model
        multiply_patches(model)
        self._frozen: list[nn.Module] = []
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, batch: ImageTextBatch) -> TwoTowerOutput:
        views = self.image_features(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        captions = self.text_features(batch.input_ids.flatten(0, 1)).unflatten(0, batch.input_ids.shape[:2])
        bias = getattr(self.model, "logit_bias", None)
        return TwoTowerOutput(views, captions, self.logit_scale, None if bias is None else bias.reshape(()))

    def image_features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        return unit(self.image_vectors(images))

    def text_features(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        return unit(self.text_vectors(input_ids))

    def image_vectors(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        """As the tower gives them: of any length."""
        pixels = normalise(images, self.mean, self.std)
        vectors: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return vectors

    def text_vectors(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """As the tower gives them: of any length."""
        vectors: Tensor = self.model.get_text_features(input_ids=input_ids, attention_mask=self._mask(input_ids)).pooler_output
        return vectors

    @property
    def sees_padding(self) -> bool:
        """Whether a text's features change with the padding behind it, as SigLIP's do, which was trained so."""
        return bool(self.model.config.text_config.model_type == "siglip_text_model")

    @property
    def logit_bias(self) -> float | None:
        """Of models that were made for the sigmoid loss."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.detach())

    def _mask(self, input_ids: Int[Tensor, "b l"]) -> Int[Tensor, "b l"] | Bool[Tensor, "b 1 1 l"] | None:
        """True for text, false for padding. For SDPA in the form that its kernels take: of any other transformers first asks whether
        something is masked at all, and waits for the device to answer."""
        config = self.model.config.text_config
        if config.model_type in UNMASKED:
            return None
        text = input_ids != config.pad_token_id
        return text[:, None, None] if config._attn_implementation == "sdpa" else text.long()

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        found = scale_parameter(self.model)
        assert found is not None, "towers are compared by it"
        return found.factor(found.parameter).reshape(())

    @property
    def beside(self) -> dict[str, nn.Module]:
        """What a bundle keeps beside the model, by the file's name: nothing."""
        return {}

    @property
    def depends_on_batch(self) -> bool:
        """Whether an image's features change with the others of its batch, as batch normalisation in training makes them."""
        return any(norm.training for norm in batch_norms(self.model))

    def attend_for(self, device: torch.device) -> None:
        """Choose the attention kernel: SDPA, but on a CPU, where the backward of its kernel takes 44 % of a small model's step."""
        self.attend("eager" if device.type == "cpu" else "sdpa")

    def attend(self, implementation: Literal["eager", "sdpa"]) -> None:
        """A joined tower that does not have it keeps its own."""
        if self.model.config.model_type == "align":  # reads this at each call, though its class says that it has no SDPA
            self.model.config.text_config._attn_implementation = implementation
            return
        with suppress(ValueError):
            self.model.set_attn_implementation(implementation)

    def blocks(self) -> list[nn.Module]:
        """The blocks of both towers: transformers', and EfficientNet's of ALIGN."""
        from transformers.modeling_layers import GradientCheckpointingLayer
        from transformers.models.align.modeling_align import AlignVisionBlock

        return [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer | AlignVisionBlock)]

    def freeze(self, tower: Tower) -> None:
        """Train the other tower alone, with the temperature (LiT: Zhai et al. 2022, arXiv 2111.07991, freezes the image tower).

        A frozen tower computes as in evaluation: no dropout, running statistics. Its projection is frozen with it, but for two towers that
        were joined here, of which it is no part.
        """
        model, projection = {Tower.VISION: ("vision_model", "visual_projection"), Tower.TEXT: ("text_model", "text_projection")}[tower]
        joined = self.model.config.model_type == "vision-text-dual-encoder"
        names = (model,) if joined or not hasattr(self.model, projection) else (model, projection)
        self._frozen += [getattr(self.model, name).requires_grad_(False).eval() for name in names]

    def train(self, mode: bool = True) -> TwoTower:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def drop_patches(self, share: float) -> None:
        """In training, leave a random `share` of an image's patches out.

        Raises:
            ConfigError: the image tower does not compute patch by patch, each with its place.
        """
        config, embeddings = self.model.config.vision_config, self.model.vision_model.embeddings
        if all(getattr(embeddings, name, None) is None for name in ("position_embedding", "position_embeddings")):
            raise ConfigError(
                f"towers.patch_dropout leaves patches of a vision transformer out, and {config.model_type} is none whose patches have"
                " places of their own: set towers.patch_dropout=0"
            )
        drop_patches(embeddings, share, (config.image_size // config.patch_size) ** 2)

    def compile_blocks(self) -> None:
        """Compile the transformer blocks. To be called before `checkpoint_activations`."""
        compile_blocks(transformer_blocks(self.model))

    def checkpoint_activations(self) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        checkpoint_blocks(self.blocks())


def normalise(images: UInt8[Tensor, "b h w 3"], mean: Float[Tensor, " 3"], std: Float[Tensor, " 3"]) -> Float[Tensor, "b 3 h w"]:
    """uint8 pixels to a tower's input, on the device they are on."""
    return ((images.to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


def unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """L2-normalised, in fp32 at least: half precision has too few digits for logits of up to 100."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
