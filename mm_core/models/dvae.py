"""A discrete VAE (Ramesh et al. 2021, arXiv 2102.12092, section 2.1 and appendix A): transformers' `FlavaImageCodebook` as its encoder, so
that what is exported gives FLAVA its image tokens, and DALL-E's decoder, which transformers does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mm_core.config import Config
from mm_core.distributed import GlobalBatch
from mm_core.errors import ConfigError
from mm_core.models.blocks import checkpoint_blocks
from mm_core.models.codebook import CODEBOOK_STRIDE, CodebookSizes, codebook_pixels, codebook_settings, from_codebook_pixels

if TYPE_CHECKING:
    from transformers import FlavaImageCodebook

DECODER = "decoder.safetensors"
"""Of a bundle: what makes pictures of its entries."""
_GROUPS = 4
_EVEN = 0.02
"""Of the first logits: an encoder that is sure of its entries before the decoder knows them never learns to use more than a few."""


class DvaeConfig(Config):
    """Sizes of encoder and decoder."""

    derived: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"image"})
    reads_text: ClassVar[bool] = False

    family: Literal["codebook"] = "codebook"
    image_size: int = Field(gt=0, description="Side of the square input, pixels; a multiple of 8.")
    codebook: CodebookSizes = CodebookSizes()
    decoder_width: int = Field(default=256, gt=3, description="Channels of the decoder's last group; the first has eight times as many.")
    bottleneck: int = Field(default=128, gt=0, description="Channels that an entry is turned into.")

    @property
    def is_resolved(self) -> bool:
        return True


def codebook_tiny() -> DvaeConfig:
    """Trains in minutes on two CPU cores."""
    return DvaeConfig(image_size=32, codebook=CodebookSizes(width=16, blocks_per_group=1, entries=128), decoder_width=16, bottleneck=32)


def build_codebook(config: DvaeConfig) -> FlavaImageCodebook:
    """The encoder, with fresh weights, trained.

    Raises:
        ConfigError: an image size that its strides do not divide.
    """
    if config.image_size % CODEBOOK_STRIDE:
        raise ConfigError(f"model.image_size {config.image_size} of a codebook is no multiple of {CODEBOOK_STRIDE}")
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    model = FlavaImageCodebook(FlavaImageCodebookConfig(**codebook_settings(config.codebook)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # transformers' own, 0.02 whatever the size, lets a picture vanish in a narrow encoder
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        model.blocks.output.conv.weight.mul_(_EVEN)
    return model.requires_grad_(True)


@dataclass(frozen=True)
class DvaeBatch:
    """One rank's pictures of a step."""

    images: UInt8[Tensor, "b h w 3"]
    temperature: float
    """Of the relaxed choice of entries: near 0 it is a choice."""
    kl_weight: float
    whole: GlobalBatch


@dataclass(frozen=True)
class DvaeOutput:
    pixels: Float[Tensor, "b 3 h w"]
    """What was to be reconstructed, in (0, 1)."""
    reconstruction: Float[Tensor, "b 6 h w"]
    """Location and log scale of each channel's logit-Laplace distribution."""
    logits: Float[Tensor, "b k n m"]
    """Of the entries."""


class DiscreteVae(nn.Module):
    """Encoder and decoder. `model` is the encoder: what is exported."""

    depends_on_batch = False
    trains_in_parts = False

    def __init__(self, model: FlavaImageCodebook, config: DvaeConfig) -> None:
        super().__init__()
        self.model = model
        self.decoder = _decoder(config, model.config.num_blocks_per_group)
        self._size = config.image_size

    def forward(self, batch: DvaeBatch) -> DvaeOutput:
        pixels = codebook_pixels(batch.images, self._size).contiguous()  # gradients as DDP lays its buckets out
        logits = self.model(pixels)
        chosen = functional.gumbel_softmax(logits.float(), tau=batch.temperature, dim=1)
        return DvaeOutput(pixels, self.decoder(chosen), logits)

    @torch.no_grad()
    def reconstruct(self, images: UInt8[Tensor, "b h w 3"]) -> UInt8[Tensor, "b h w 3"]:
        """Of each picture what its entries alone say."""
        entries: Int[Tensor, "b n m"] = self.model.get_codebook_indices(codebook_pixels(images, self._size))
        chosen = functional.one_hot(entries, self.model.vocab_size).permute(0, 3, 1, 2).float()
        return from_codebook_pixels(torch.sigmoid(self.decoder(chosen)[:, :3]))

    @property
    def beside(self) -> dict[str, nn.Module]:
        """What a bundle keeps beside the model, by the file's name."""
        return {DECODER: self.decoder}

    def attend_for(self, device: torch.device) -> None:
        """It has no attention."""

    def blocks(self) -> list[nn.Module]:
        from transformers.models.flava.modeling_flava import FlavaImageCodebookBlock

        return [module for module in self.modules() if isinstance(module, FlavaImageCodebookBlock)]

    def checkpoint_activations(self) -> None:
        """Keep only each block's input, and compute the rest again in backward."""
        checkpoint_blocks(self.blocks())


def _decoder(config: DvaeConfig, blocks_per_group: int) -> nn.Sequential:
    """The encoder's groups in reverse, each but the last followed by an enlargement to twice the side."""
    from transformers.models.flava.modeling_flava import FlavaImageCodebookBlock

    widths = [config.decoder_width * factor for factor in (8, 4, 2, 1)]
    layers: list[nn.Module] = [nn.Conv2d(config.codebook.entries, config.bottleneck, 1)]
    before = config.bottleneck
    for number, width in enumerate(widths):
        for block in range(blocks_per_group):
            layers.append(FlavaImageCodebookBlock(before if block == 0 else width, width, _GROUPS * blocks_per_group))
        before = width
        if number < _GROUPS - 1:
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(before, 6, 1))
