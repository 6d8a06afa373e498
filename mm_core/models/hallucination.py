"""What stands in for a side that is missing: the feature that it would have had, told from the other side (Hoffman et al. 2016, "Learning
with Side Information through Modality Hallucination", section 3: a branch trained to give the features of a modality that is absent later).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import FlavaConfig

HALLUCINATION = "hallucination.safetensors"
"""Of a bundle: the head's weights."""


class Hallucination(nn.Module):
    """From a tower's class token the other tower's, and from that one more token for the fusion."""

    def __init__(self, config: FlavaConfig) -> None:
        super().__init__()
        width: int = config.multimodal_config.hidden_size
        self.text_of, self.image_of = _perceptron(width), _perceptron(width)
        self.text_token, self.image_token = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        """How near what it says of image and of text is to what they are, as a cosine. The towers are not pulled by it."""
        image, text = image.detach(), text.detach()
        guesses = functional.cosine_similarity(self.image_of(text), image), functional.cosine_similarity(self.text_of(image), text)
        return torch.stack(guesses, dim=1)

    def of_image(self, image: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """For the text that an image lacks. Its tower is not pulled by it."""
        return self.text_token(self.text_of(image.detach()))

    def of_text(self, text: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """For the image that a text lacks. Its tower is not pulled by it."""
        return self.image_token(self.image_of(text.detach()))

    def of_either(self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"], seen: Bool[Tensor, "b 2"]) -> Float[Tensor, "b d"]:
        """By what is seen of each pair; of one whose sides are both seen it is not to be read."""
        return torch.where(seen[:, :1], self.of_image(image), self.of_text(text))


def load_hallucination(config: FlavaConfig, folder: Path) -> Hallucination | None:
    """A bundle's; None where it has none."""
    if not (folder / HALLUCINATION).is_file():
        return None
    head = Hallucination(config)
    head.load_state_dict(load_file(folder / HALLUCINATION))
    return head


def _perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
