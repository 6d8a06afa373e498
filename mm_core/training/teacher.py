"""A distillation's teacher on the student's batches: as the student computes them, in numbers and in pieces, but without gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from mm_core.models.two_tower import ImageTextBatch, TwoTower, TwoTowerOutput
from mm_core.training.gradient_cache import joined_output, pieces_for, split_batch


class Teacher:
    """Nothing of it is trained, and nothing dropped."""

    def __init__(
        self, model: TwoTower, *, forward: Callable[[], AbstractContextManager[object]], micro_batch_size: int | None = None
    ) -> None:
        """
        Args:
            model: on the batches' device.
            forward: entered around each call of the model; for autocast.
            micro_batch_size: samples that go through the model at a time; None for all of a batch.
        """
        self._model, self._forward, self._micro_batch_size = model.eval().requires_grad_(False), forward, micro_batch_size

    @torch.no_grad()
    def __call__(self, batch: ImageTextBatch) -> TwoTowerOutput:
        pieces = 1 if self._micro_batch_size is None else pieces_for([len(batch.images)], self._micro_batch_size)
        outputs = []
        for piece in split_batch(batch, pieces):
            with self._forward():
                outputs.append(self._model(piece))
        whole: TwoTowerOutput = joined_output(outputs)
        return whole
