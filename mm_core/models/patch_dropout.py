"""Random patches are left out of an image in training (FLIP: Li et al. 2023, arXiv 2212.00794): without half of them the image tower
takes half the time and memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def drop_patches(embeddings: nn.Module, share: float, patches: int) -> None:
    """From now on `embeddings`, a vision transformer's, hands on each image's patches but for a random `share`; all of them in evaluation.
    What is no patch stays: tokens in front of the `patches`, as CLIP's class token."""

    def hook(module: nn.Module, inputs: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"] | None:
        if not module.training:
            return None
        first = tokens.shape[1] - patches
        kept = max(1, round(patches * (1 - share)))
        chosen = torch.rand((len(tokens), patches), device=tokens.device).topk(kept, dim=1).indices
        return torch.cat([tokens[:, :first], tokens[:, first:].take_along_dim(chosen[..., None], dim=1)], dim=1)

    embeddings.register_forward_hook(hook)
