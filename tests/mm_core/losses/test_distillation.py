"""The divergence beside torch's, and nothing where student and teacher agree."""

from __future__ import annotations

import torch

from mm_core.losses.distillation import distillation_loss
from tests.mm_core.losses.pairs import unit


def test_it_is_the_mean_divergence_of_rows_and_columns() -> None:
    image, text, their_image, their_text = unit(5, 8, seed=0), unit(5, 2, 8, seed=1), unit(5, 4, seed=2), unit(5, 2, 4, seed=3)
    scale, their_scale = torch.tensor(5.0).double(), torch.tensor(9.0).double()
    ours, theirs = scale * image @ text.flatten(0, 1).T, their_scale * their_image @ their_text.flatten(0, 1).T
    expected = torch.zeros((), dtype=torch.float64)
    for student, teacher in ((ours, theirs), (ours.T, theirs.T)):
        p, q = teacher.softmax(1), student.softmax(1)
        expected += (p * (p / q).log()).sum(1).mean() / 2
    for block_bytes in (1, 1 << 20):
        found = distillation_loss(
            image, text, image, text, scale, their_image, their_text, their_image, their_text, their_scale, block_bytes=block_bytes
        )
        torch.testing.assert_close(found, expected)


def test_a_student_like_its_teacher_has_no_loss() -> None:
    image, text, scale = unit(5, 8, seed=0), unit(5, 1, 8, seed=1), torch.tensor(5.0).double()
    pair = (image, text, image, text, scale)
    assert abs(float(distillation_loss(*pair, *pair))) < 1e-12
