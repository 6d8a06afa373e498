"""Objectives of two towers over the global batch: what one rank computes of them, with the features of all ranks.

Several views of an image count as the mean of their losses (DeCLIP's multi-view supervision: Li et al. 2021, arXiv 2110.05208).
`LossOutput` says how a share is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mm_core.distributed import Around, exchange_in_ring, gather_features
from mm_core.errors import ConfigError
from mm_core.losses.blocks import BLOCK_BYTES
from mm_core.losses.contrastive import contrastive_loss
from mm_core.losses.distillation import distillation_loss
from mm_core.losses.sigmoid import sigmoid_loss
from mm_core.losses.triplet import triplet_loss
from mm_core.models.two_tower import ImageTextBatch, TwoTowerOutput
from mm_core.objectives.config import ObjectiveConfig, ObjectiveKind
from mm_core.objectives.output import LossOutput, Objective

Gather = Callable[[Tensor, Sequence[int]], Tensor]
Teaching = Callable[[ImageTextBatch], TwoTowerOutput]
"""A teacher's features, without gradients."""


def build_objective(
    config: ObjectiveConfig,
    *,
    rank: int = 0,
    teacher: Teaching | None = None,
    around: Around = nullcontext,
    block_bytes: int = BLOCK_BYTES,
) -> Objective:
    """
    Args:
        teacher: of distillation.
        around: entered for the messages between ranks; for a clock.
        block_bytes: the largest part of a similarity matrix that is held at a time.
    """
    gather = partial(gather_features, around=around)
    match config.kind:
        case ObjectiveKind.CONTRASTIVE:
            return ContrastiveObjective(config.label_smoothing, rank=rank, gather=gather, block_bytes=block_bytes)
        case ObjectiveKind.SIGMOID:
            return SigmoidObjective(around=around, block_bytes=block_bytes)
        case ObjectiveKind.TRIPLET:
            return TripletObjective(config.margin, rank=rank, gather=gather, block_bytes=block_bytes)
        case ObjectiveKind.DISTILLATION:
            assert teacher is not None, "the driver loads it"
            return DistillationObjective(config, teacher, rank=rank, gather=gather, block_bytes=block_bytes)


class _Everyone(NamedTuple):
    """Features of all ranks, in rank order."""

    images: Float[Tensor, "B v d"]
    texts: Float[Tensor, "B c d"]


def _gather(output: TwoTowerOutput, counts: Sequence[int], gather: Gather) -> _Everyone:
    """One message for both modalities."""
    views, texts = output.image_features.shape[1], output.text_features.shape[1]
    features = torch.cat([output.image_features, output.text_features], dim=1)
    return _Everyone(*gather(features.flatten(1), counts).unflatten(1, (views + texts, -1)).split([views, texts], dim=1))


class ContrastiveObjective:
    """InfoNCE with the features of all ranks, gradients flowing back to each. On one rank, with one view and text, CLIP's own loss."""

    def __init__(
        self, label_smoothing: float = 0.0, *, rank: int = 0, gather: Gather = gather_features, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self._loss = partial(contrastive_loss, label_smoothing=label_smoothing, block_bytes=block_bytes)
        self._rank, self._gather = rank, gather

    def __call__(self, output: TwoTowerOutput, batch: ImageTextBatch, counts: Sequence[int]) -> LossOutput:
        everyone, first = _gather(output, counts, self._gather), sum(counts[: self._rank])
        shares = [
            self._loss(image, output.text_features, all_image, everyone.texts, output.logit_scale, first)
            for image, all_image in zip(output.image_features.unbind(1), everyone.images.unbind(1), strict=True)
        ]
        return LossOutput.of({"contrastive": torch.stack(shares).mean() + _unused(output.logit_bias)}, len(counts))


class SigmoidObjective:
    """SigLIP's loss: texts travel from rank to rank, and no rank holds those of more than one other."""

    def __init__(self, *, around: Around = nullcontext, block_bytes: int = BLOCK_BYTES) -> None:
        self._around, self._block_bytes = around, block_bytes

    def __call__(self, output: TwoTowerOutput, batch: ImageTextBatch, counts: Sequence[int]) -> LossOutput:
        """
        Raises:
            ConfigError: the model has no logit bias.
        """
        if output.logit_bias is None:
            raise ConfigError("objective.kind=sigmoid needs a model with a logit bias: take a siglip recipe, or kind=contrastive")
        texts = output.text_features.shape[1]
        exchange = partial(exchange_in_ring, counts=[count * texts for count in counts], around=self._around)
        shares = [
            sigmoid_loss(
                image,
                output.text_features,
                output.logit_scale,
                output.logit_bias,
                sum(counts),
                exchange=exchange,
                block_bytes=self._block_bytes,
            )
            for image in output.image_features.unbind(1)
        ]
        return LossOutput.of({"sigmoid": torch.stack(shares).mean()}, len(counts))


class TripletObjective:
    """Semi-hard triplets, mined in the global batch. The temperature has no part in it."""

    def __init__(self, margin: float, *, rank: int = 0, gather: Gather = gather_features, block_bytes: int = BLOCK_BYTES) -> None:
        self._loss = partial(triplet_loss, margin=margin, block_bytes=block_bytes)
        self._rank, self._gather = rank, gather

    def __call__(self, output: TwoTowerOutput, batch: ImageTextBatch, counts: Sequence[int]) -> LossOutput:
        everyone, first = _gather(output, counts, self._gather), sum(counts[: self._rank])
        shares = [
            self._loss(image, output.text_features, all_image, everyone.texts, first)
            for image, all_image in zip(output.image_features.unbind(1), everyone.images.unbind(1), strict=True)
        ]
        unused = _unused(output.logit_scale, output.logit_bias)
        return LossOutput.of({"triplet": torch.stack(shares).mean() + unused}, len(counts))


class DistillationObjective:
    """InfoNCE, and the divergence from a teacher's similarities of the same global batch."""

    def __init__(
        self,
        config: ObjectiveConfig,
        teacher: Teaching,
        *,
        rank: int = 0,
        gather: Gather = gather_features,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._contrastive = partial(contrastive_loss, label_smoothing=config.label_smoothing, block_bytes=block_bytes)
        self._distillation = partial(distillation_loss, block_bytes=block_bytes)
        self._weight, self._teacher = config.teacher_weight, teacher
        self._rank, self._gather = rank, gather

    def __call__(self, output: TwoTowerOutput, batch: ImageTextBatch, counts: Sequence[int]) -> LossOutput:
        teacher = self._teacher(batch)
        all_teacher = _gather(teacher, counts, self._gather)
        everyone, first = _gather(output, counts, self._gather), sum(counts[: self._rank])
        shares: dict[str, list[Tensor]] = {"contrastive": [], "distillation": []}
        for view, (image, all_image) in enumerate(zip(output.image_features.unbind(1), everyone.images.unbind(1), strict=True)):
            student = (image, output.text_features, all_image, everyone.texts, output.logit_scale)
            theirs = (teacher.image_features[:, view], teacher.text_features, all_teacher.images[:, view], all_teacher.texts)
            shares["contrastive"].append(self._contrastive(*student, first))
            shares["distillation"].append(self._weight * self._distillation(*student, *theirs, teacher.logit_scale))
        unused = _unused(output.logit_bias)
        return LossOutput.of({name: torch.stack(each).mean() + unused for name, each in shares.items()}, len(counts))


def _unused(*parameters: Tensor | None) -> Tensor | float:
    """Nothing, but with a gradient for each: DDP waits for one of every parameter, of those the objective does not read too."""
    return sum(0 * parameter for parameter in parameters if parameter is not None)
