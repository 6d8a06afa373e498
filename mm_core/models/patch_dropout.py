"""Random patches are left out of an image in training (FLIP: Li et al. 2023, arXiv 2212.00794): without half of them the image tower
takes half the time and memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def drop_patches(embeddings: nn.Module, share: float) -> None:
    """From now on `embeddings`, a vision transformer's, hands on each image's patches but for a random `share`; all of them in evaluation.
    A class token, which CLIP's has in front, stays."""
    first = 1 if hasattr(embeddings, "class_embedding") else 0

    def hook(module: nn.Module, inputs: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"] | None:
        if not module.training:
            return None
        patches = tokens[:, first:]
        kept = max(1, round(patches.shape[1] * (1 - share)))
        chosen = torch.rand(patches.shape[:2], device=patches.device).topk(kept, dim=1).indices
        return torch.cat([tokens[:, :first], patches.take_along_dim(chosen[..., None], dim=1)], dim=1)

    embeddings.register_forward_hook(hook)
