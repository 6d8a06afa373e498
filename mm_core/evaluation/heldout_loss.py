"""The training objective on held-out features, in one process: comparable with the training loss, whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from mm_core.models.two_tower import ImageTextBatch, TwoTowerOutput
from mm_core.objectives.config import ObjectiveConfig, ObjectiveKind
from mm_core.objectives.contrastive import build_objective


@torch.no_grad()
def heldout_loss(
    config: ObjectiveConfig,
    images: Float[np.ndarray, "n d"],
    texts: Float[np.ndarray, "n d"],
    *,
    logit_scale: float,
    logit_bias: float | None,
    batch_size: int,
    device: torch.device,
) -> float:
    """The mean over batches of `batch_size`, as the loss depends on it; of fewer samples there is one batch of all of them.

    Samples come in an order drawn once and for all, since neighbours in a shard may be alike; a rest that fills no batch is left
    out. Of a distillation it is the contrastive term: the teacher sees no held-out samples.
    """
    size = min(batch_size, len(images))
    order = np.random.default_rng(0).permutation(len(images))
    objective = build_objective(_without_teacher(config))
    scale, bias = torch.tensor(logit_scale, device=device), None if logit_bias is None else torch.tensor(logit_bias, device=device)
    nothing = torch.empty(0, device=device)
    losses = []
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        views, captions = (torch.from_numpy(features[rows]).to(device)[:, None] for features in (images, texts))
        batch = ImageTextBatch(nothing.byte().reshape(0, 0, 0, 0, 3), nothing.long().reshape(0, 0, 0))
        losses.append(objective(TwoTowerOutput(views, captions, scale, bias), batch, [size]).total)
    return float(torch.stack(losses).double().mean())


def _without_teacher(config: ObjectiveConfig) -> ObjectiveConfig:
    return ObjectiveConfig(label_smoothing=config.label_smoothing) if config.kind is ObjectiveKind.DISTILLATION else config
