"""Starting a model from another's weights: all of them, or those that fit."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

_POSITIONS = (
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.embeddings.position_embeddings",
    "flava.image_model.embeddings.position_embeddings",
)
"""By model: CLIP's and SigLIP's table, and the one that ViT and its kin, FLAVA's image tower too, have in front of an axis of one."""


class InitMatch(StrEnum):
    EXACT = "exact"
    """The same architecture; the image size alone may differ."""
    PARTIAL = "partial"
    """Tensors of the same name and shape; the others stay fresh."""


@dataclass(frozen=True)
class WarmStart:
    """What was taken."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    """Taken, and fitted to another image size."""
    fresh: tuple[str, ...]
    """Tensors of the model that the source has not, or in another shape."""
    unused: tuple[str, ...]
    """Tensors of the source that the model has not, or in another shape."""

    def __str__(self) -> str:
        """A line for each part, every tensor in it; those that differ in a layer's number are one name."""
        parts = [("taken over", self.loaded), ("resized", self.resized), ("fresh", self.fresh), ("not used", self.unused)]
        return "\n".join(f"{len(names):,} {what}: {', '.join(_by_layer(names))}" for what, names in parts if names)


def _by_layer(names: Sequence[str]) -> list[str]:
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def take_over(model: PreTrainedModel, source: Mapping[str, Tensor]) -> WarmStart:
    """Load what fits of another model's state into `model`, in place. Position embeddings of images are resized to the model's grid."""
    ours, theirs = model.state_dict(), dict(source)
    resized = tuple(name for name in _POSITIONS if name in ours and name in theirs and _on_another_grid(theirs[name], ours[name]))
    for name in resized:
        table = resize_positions(theirs[name].flatten(0, -2), ours[name].shape[-2])
        theirs[name] = table.view(ours[name].shape)
    fits = {name: tensor for name, tensor in theirs.items() if name in ours and ours[name].shape == tensor.shape}
    model.load_state_dict(fits, strict=False)
    return WarmStart(
        loaded=tuple(name for name in fits if name not in resized),
        resized=resized,
        fresh=tuple(name for name in ours if name not in fits),
        unused=tuple(name for name in theirs if name not in fits),
    )


def _on_another_grid(old: Tensor, new: Tensor) -> bool:
    return old.shape != new.shape and old.shape[-1] == new.shape[-1]


def resize_positions(positions: Float[Tensor, "n d"], count: int) -> Float[Tensor, "m d"]:
    """A square grid's embeddings for another grid, bicubic with antialiasing, as open_clip resizes them. Those in front of it, a class
    token's say, stay: they are what makes the number no square."""
    first = len(positions) - math.isqrt(len(positions)) ** 2
    fixed, grid = positions[:first], positions[first:]
    old, new = math.isqrt(len(grid)), math.isqrt(count - first)
    square = grid.T.unflatten(1, (old, old))[None]
    resized = torch.nn.functional.interpolate(square, (new, new), mode="bicubic", antialias=True)[0]
    return torch.cat([fixed, resized.flatten(1).T])
