"""CLIP (Radford et al. 2021, arXiv 2103.00020): sizes, transformers' `CLIPModel` built from them, and its training forward.

The wrapped `CLIPModel` is the model: what is exported loads with `CLIPModel.from_pretrained` anywhere. It is imported where one is
built, as its import takes seconds and most programs need only the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from mm_core.config import Config
from mm_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPConfig as HFClipConfig
    from transformers import CLIPModel

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
LEGACY_EOS = 2
"""With this `eos_token_id`, which the first CLIP exports state whatever their tokenizer's, transformers pools at the largest token id."""


class TowerConfig(Config):
    """One transformer; its MLP is four times as wide."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)


class ClipConfig(Config):
    """Sizes of both towers, and how images are fed."""

    family: Literal["clip"] = "clip"
    image_size: int = Field(gt=0, description="Side of the square input, pixels.")
    patch_size: int = Field(gt=0, description="Side of a patch, pixels.")
    context_length: int = Field(gt=1, description="Tokens of a caption, begin and end marks included.")
    vocab_size: int = Field(gt=0, description="Set from the tokenizer.")
    embed_dim: int = Field(gt=0, description="Of the joint space.")
    vision: TowerConfig
    text: TowerConfig
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD


def clip_vit_b32() -> ClipConfig:
    return ClipConfig(
        image_size=224,
        patch_size=32,
        context_length=77,
        vocab_size=49408,
        embed_dim=512,
        vision=TowerConfig(width=768, layers=12, heads=12),
        text=TowerConfig(width=512, layers=12, heads=8),
    )


def clip_vit_b16() -> ClipConfig:
    return clip_vit_b32().model_copy(update={"patch_size": 16})


def clip_vit_l14() -> ClipConfig:
    return clip_vit_b32().model_copy(
        update={
            "patch_size": 14,
            "embed_dim": 768,
            "vision": TowerConfig(width=1024, layers=24, heads=16),
            "text": TowerConfig(width=768, layers=12, heads=12),
        }
    )


def clip_tiny() -> ClipConfig:
    """Trains in minutes on two CPU cores."""
    return ClipConfig(
        image_size=64,
        patch_size=16,
        context_length=32,
        vocab_size=1024,
        embed_dim=128,
        vision=TowerConfig(width=128, layers=4, heads=4),
        text=TowerConfig(width=128, layers=3, heads=4),
        hidden_act="gelu",
    )


def clip_tiny_photo() -> ClipConfig:
    """For photographs, still on two CPU cores: 36 patches, a larger vocabulary."""
    return ClipConfig(
        image_size=96,
        patch_size=16,
        context_length=24,
        vocab_size=4096,
        embed_dim=192,
        vision=TowerConfig(width=192, layers=6, heads=6),
        text=TowerConfig(width=192, layers=3, heads=6),
        hidden_act="gelu",
    )


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of a tokenizer's marks."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class ImageTextBatch:
    """One rank's pairs of a step."""

    images: UInt8[Tensor, "b v h w 3"]
    """v views of each."""
    input_ids: Int[Tensor, "b l"]


@dataclass(frozen=True)
class TwoTowerOutput:
    """Features are L2-normalised; `logit_scale` is the factor itself, not its logarithm."""

    image_features: Float[Tensor, "b v d"]
    text_features: Float[Tensor, "b d"]
    logit_scale: Float[Tensor, ""]


def build_clip(config: ClipConfig, tokens: SpecialTokens) -> CLIPModel:
    """A `CLIPModel` with fresh weights.

    Raises:
        ConfigError: sizes that do not fit, or an EOS id that would switch on transformers' legacy pooling.
    """
    if tokens.eos == LEGACY_EOS:
        raise ConfigError(
            f"the tokenizer's end-of-text id is {LEGACY_EOS}, for which transformers' CLIP pools at the wrong token: use another tokenizer"
        )
    if max(tokens.bos, tokens.eos, tokens.pad) >= config.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.vocab_size} does not hold the tokenizer's marks {tokens}: set it to the tokenizer's size"
        )
    if config.image_size % config.patch_size:
        raise ConfigError(f"image_size {config.image_size} is no multiple of patch_size {config.patch_size}")
    for name, tower in (("vision", config.vision), ("text", config.text)):
        if tower.width % tower.heads:
            raise ConfigError(f"model.{name}.width {tower.width} is no multiple of its {tower.heads} heads")
    from transformers import CLIPModel

    return CLIPModel(hf_config(config, tokens))


def hf_config(config: ClipConfig, tokens: SpecialTokens) -> HFClipConfig:
    """The same sizes as transformers' configuration."""
    from transformers import CLIPConfig as HFClipConfig

    shared = {"hidden_act": config.hidden_act, "projection_dim": config.embed_dim}
    return HFClipConfig(
        text_config={
            **_tower(config.text),
            **shared,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
        },
        vision_config={**_tower(config.vision), **shared, "image_size": config.image_size, "patch_size": config.patch_size},
        projection_dim=config.embed_dim,
    )


def attend_for(model: CLIPModel, device: torch.device) -> None:
    """Choose the attention kernel: SDPA, but on a CPU, where the backward of its kernel takes 44 % of a small model's step."""
    model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")


def parameter_count(config: ClipConfig) -> int:
    """Counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_clip(config, SpecialTokens(bos=0, eos=config.vocab_size - 1, pad=1)).parameters())


def normalise(images: UInt8[Tensor, "b h w 3"], mean: Float[Tensor, " 3"], std: Float[Tensor, " 3"]) -> Float[Tensor, "b 3 h w"]:
    """uint8 pixels to a tower's input, on the device they are on."""
    return ((images.to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


class TwoTower(nn.Module):
    """A `CLIPModel` as training calls it: uint8 images and token ids in, normalised features out."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIPModel, *, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, batch: ImageTextBatch) -> TwoTowerOutput:
        views = self.image_features(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        return TwoTowerOutput(views, self.text_features(batch.input_ids), self.logit_scale)

    def image_features(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        pixels = normalise(images, self.mean, self.std)
        return _unit(self.clip.get_image_features(pixel_values=pixels).pooler_output)

    def text_features(self, input_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """No attention mask: text is causal and pooled at the first EOS, so the padding behind it is never seen."""
        return _unit(self.clip.get_text_features(input_ids=input_ids).pooler_output)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        return self.clip.logit_scale.exp()


def _unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """L2-normalised, in fp32 at least: half precision has too few digits for logits of up to 100."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _tower(tower: TowerConfig) -> dict[str, int]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
    }
