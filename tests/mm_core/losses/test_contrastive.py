"""The loss beside its formula, written out. Ranks and gradients: tests/mm_core/training/test_gradients.py."""

from __future__ import annotations

import torch
from torch.nn import functional

from mm_core.losses.contrastive import contrastive_loss
from tests.mm_core.losses.pairs import unit

SCALE = torch.tensor(7.0, dtype=torch.float64)


def loss_of(image: torch.Tensor, text: torch.Tensor, **settings: float) -> torch.Tensor:
    return contrastive_loss(image, text, image, text, SCALE, 0, **settings)  # type: ignore[arg-type]


def test_it_is_the_papers() -> None:
    """Figure 3 of the CLIP paper."""
    image, text = unit(5, 8, seed=0), unit(5, 1, 8, seed=1)
    logits, labels = SCALE * image @ text[:, 0].T, torch.arange(5)
    for smoothing in (0.0, 0.1):  # ALIGN's
        expected = (
            functional.cross_entropy(logits, labels, label_smoothing=smoothing)
            + functional.cross_entropy(logits.T, labels, label_smoothing=smoothing)
        ) / 2
        torch.testing.assert_close(loss_of(image, text, label_smoothing=smoothing), expected)


def test_a_perfect_model_has_no_loss() -> None:
    image = torch.eye(3, dtype=torch.float64)
    assert float(contrastive_loss(image, image[:, None], image, image[:, None], torch.tensor(100.0), 0)) < 1e-6


def test_several_texts_share_an_images_target() -> None:
    image, text = unit(4, 8, seed=0), unit(4, 3, 8, seed=1)
    log_p = (SCALE * image @ text.flatten(0, 1).T).log_softmax(1)
    rows = -sum(log_p[i, 3 * i : 3 * i + 3].mean() for i in range(4)) / 4
    columns = functional.cross_entropy(SCALE * text.flatten(0, 1) @ image.T, torch.arange(4).repeat_interleave(3))
    torch.testing.assert_close(loss_of(image, text), (rows + columns) / 2)

    same = text[:, :1].expand(-1, 3, -1)  # an image's own texts compete: ln 3 on its side
    torch.testing.assert_close(loss_of(image, same), loss_of(image, text[:, :1]) + torch.tensor(3.0, dtype=torch.float64).log() / 2)


def test_blocks_change_nothing() -> None:
    image, text = unit(7, 8, seed=0).requires_grad_(), unit(7, 2, 8, seed=1).requires_grad_()
    for block_bytes in (1, 200, 1 << 20):
        whole = torch.autograd.grad(loss_of(image, text), (image, text))
        blocks = torch.autograd.grad(loss_of(image, text, block_bytes=block_bytes), (image, text))
        for one, other in zip(whole, blocks, strict=True):
            torch.testing.assert_close(one, other)
