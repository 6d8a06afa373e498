"""Semi-hard mining beside a loop over anchors."""

from __future__ import annotations

import torch

from mm_core.losses.triplet import triplet_loss
from tests.mm_core.losses.pairs import unit


def mined(anchor: torch.Tensor, positive: torch.Tensor, negatives: torch.Tensor, margin: float) -> float:
    near = float(((anchor - positive) ** 2).sum())
    distances = [float(((anchor - negative) ** 2).sum()) for negative in negatives]
    semi_hard = [d for d in distances if d > near]
    return max(0.0, near - (min(semi_hard) if semi_hard else max(distances)) + margin)


def test_negatives_are_the_papers() -> None:
    for captions, spread in ((1, 1.0), (2, 0.3)):
        image = unit(6, 4, seed=0)
        text = torch.nn.functional.normalize(image[:, None] + spread * unit(6, captions, 4, seed=2), dim=-1)
        losses = []
        for i in range(6):
            others = [j for j in range(6) if j != i]
            for c in range(captions):
                losses.append(mined(image[i], text[i, c], text[others].flatten(0, 1), 0.4))
                losses.append(mined(text[i, c], image[i], image[others], 0.4))
        assert any(losses)
        for block_bytes in (1, 1 << 20):
            found = triplet_loss(image, text, image, text, 0, margin=0.4, block_bytes=block_bytes)
            torch.testing.assert_close(found, torch.tensor(losses, dtype=torch.float64).mean())


def test_one_pair_alone_has_no_negative() -> None:
    image, text = unit(1, 4, seed=0).requires_grad_(), unit(1, 1, 4, seed=1)
    loss = triplet_loss(image, text, image, text, 0, margin=0.2)
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, image)[0].isfinite().all()
