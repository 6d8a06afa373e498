"""A teacher computes as its student does: as many samples at a time, in the same numbers."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from mm_core.config import resolve
from mm_core.models.clip import clip_tiny
from mm_core.models.family import build_model
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import ImageTextBatch, TwoTower, TwoTowerOutput
from mm_core.training.clock import StepClock
from mm_core.training.precision import Precision, autocast
from mm_core.training.teacher import Teacher
from pipelines.recipes import recipe
from pipelines.train.loop import build_step

CPU = torch.device("cpu")


class Watched(TwoTower):
    """Notes how each of its calls computes."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(build_model(clip_tiny(), SpecialTokens(bos=3, eos=4, pad=0)))
        self.samples, self.in_bf16, self.with_gradients = list[int](), set[bool](), set[bool]()

    def forward(self, batch: ImageTextBatch) -> TwoTowerOutput:
        self.samples.append(len(batch.images))
        self.in_bf16.add(torch.is_autocast_enabled("cpu"))
        self.with_gradients.add(torch.is_grad_enabled())
        return super().forward(batch)


def batch(samples: int) -> ImageTextBatch:
    ids = torch.randint(5, 100, (samples, 1, 32))
    ids[..., -1] = 4
    return ImageTextBatch(torch.randint(0, 256, (samples, 1, 64, 64, 3), dtype=torch.uint8), ids)


def test_pieces_give_the_features_of_the_whole() -> None:
    model, data = Watched(), batch(7)
    whole, pieces = (Teacher(model, forward=nullcontext, micro_batch_size=size)(data) for size in (None, 3))
    assert model.samples == [7, 3, 2, 2]
    for name in ("image_features", "text_features", "logit_scale"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name))
        assert not getattr(pieces, name).requires_grad


def test_features_are_fp32_under_autocast() -> None:
    model, data = Watched(), batch(4)
    plain = Teacher(model, forward=nullcontext)(data)
    cast = Teacher(model, forward=partial(autocast, Precision.BF16, CPU))(data)
    assert cast.image_features.dtype == torch.float32
    assert 0 < (cast.image_features - plain.image_features).abs().max() < 0.02


@pytest.mark.usefixtures("process_group")
def test_a_runs_teacher_takes_its_precision_and_its_pieces() -> None:
    settings = ["objective={kind: distillation, teacher: a bundle}", "precision=bf16", "parallel.micro_batch_size=2", "global_batch_size=5"]
    run = resolve(recipe("clip-tiny"), environment={}, overrides=[*settings, "data.chunk=5"])[0]
    student, teacher = Watched(), Watched(seed=1)
    build_step(run, student, StepClock(CPU), teacher)(batch(5), 0)
    assert student.samples == 2 * [2, 2, 1]
    assert teacher.samples == [2, 2, 1]
    assert teacher.in_bf16 == student.in_bf16 == {True}
    assert teacher.with_gradients == {False}
