"""The loss beside algorithm 1 of the SigLIP paper, and its own gradients beside autograd's."""

from __future__ import annotations

import torch
from torch.nn import functional

from mm_core.losses.sigmoid import sigmoid_loss
from tests.mm_core.losses.pairs import unit


def written_out(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    captions = text.shape[1]
    logits = image @ text.flatten(0, 1).T * scale + bias
    labels = 2 * torch.eye(len(image), dtype=image.dtype).repeat_interleave(captions, dim=1) - 1
    return -functional.logsigmoid(labels * logits).sum() / (len(image) * captions)


def test_values_and_gradients_are_the_papers() -> None:
    for captions in (1, 3):
        inputs = [unit(5, 8, seed=0), unit(5, captions, 8, seed=1), torch.tensor(9.0).double(), torch.tensor(-8.0).double()]
        arguments = [tensor.requires_grad_() for tensor in inputs]
        expected = written_out(*arguments)
        wanted = torch.autograd.grad(2 * expected, arguments)
        for block_bytes in (1, 100, 1 << 20):
            loss = sigmoid_loss(*arguments, 5, block_bytes=block_bytes)  # type: ignore[call-arg, misc]
            torch.testing.assert_close(loss, expected)
            for one, other in zip(torch.autograd.grad(2 * loss, arguments), wanted, strict=True):
                torch.testing.assert_close(one, other)
