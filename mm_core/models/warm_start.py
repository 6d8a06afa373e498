"""Starting a model from another's weights: all of them, or those that fit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

_POSITIONS = "vision_model.embeddings.position_embedding.weight"


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
        parts = [f"{len(self.loaded):,} tensors taken over"]
        for what, names in (("resized", self.resized), ("fresh", self.fresh), ("not used", self.unused)):
            if names:
                parts.append(f"{len(names):,} {what}: {', '.join(names[:_SHOWN])}{' …' if len(names) > _SHOWN else ''}")
        return "; ".join(parts)


_SHOWN = 6


def take_over(model: PreTrainedModel, source: PreTrainedModel) -> WarmStart:
    """Load what fits of `source` into `model`, in place. Position embeddings of images are resized to the model's grid."""
    ours, theirs = model.state_dict(), dict(source.state_dict())
    resized: tuple[str, ...] = ()
    new, old = ours[_POSITIONS], theirs[_POSITIONS]
    if len(new) != len(old) and new.shape[1] == old.shape[1]:
        first = int(hasattr(model.vision_model.embeddings, "class_embedding"))
        theirs[_POSITIONS] = resize_positions(old, len(new), first)
        resized = (_POSITIONS,)
    fits = {name: tensor for name, tensor in theirs.items() if name in ours and ours[name].shape == tensor.shape}
    model.load_state_dict(fits, strict=False)
    return WarmStart(
        loaded=tuple(name for name in fits if name not in resized),
        resized=resized,
        fresh=tuple(name for name in ours if name not in fits),
        unused=tuple(name for name in theirs if name not in fits),
    )


def resize_positions(positions: Float[Tensor, "n d"], count: int, first: int) -> Float[Tensor, "m d"]:
    """A square grid's embeddings for another grid, bicubic with antialiasing, as open_clip resizes them. The `first` ones stay."""
    fixed, grid = positions[:first], positions[first:]
    old, new = round(len(grid) ** 0.5), round((count - first) ** 0.5)
    square = grid.T.unflatten(1, (old, old))[None]
    resized = torch.nn.functional.interpolate(square, (new, new), mode="bicubic", antialias=True)[0]
    return torch.cat([fixed, resized.flatten(1).T])
