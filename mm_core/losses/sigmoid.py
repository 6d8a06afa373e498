"""The sigmoid loss (SigLIP: Zhai et al. 2023, arXiv 2303.15343, algorithm 1): every image with every text is a yes-or-no question.

No softmax runs over the batch, so a rank needs the others' texts only one block at a time. The loss and its gradient are computed in the
same pass, which is why an exchange can hand both on and forget them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mm_core.losses.blocks import BLOCK_BYTES, rows_per_block

Exchange = Callable[[Tensor, Callable[[Tensor, bool], Tensor]], Tensor]
"""Brings every rank's block here, one at a time: (own block, visit) → the sum over ranks of what they returned for the own block.
`visit(block, is_own)` returns a tensor of the block's shape."""


def alone(block: Tensor, visit: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """The exchange of one rank."""
    return visit(block, True)


def sigmoid_loss(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b c d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    total: int,
    *,
    exchange: Exchange = alone,
    block_bytes: int = BLOCK_BYTES,
) -> Float[Tensor, ""]:
    """This rank's share: its images against all texts. The sum over ranks is the loss of the whole batch, -1/(B c) Σ log σ(±(s x·y + b)).

    Args:
        image, text: this rank's features, L2-normalised.
        scale, bias: s and b above.
        total: B, the images of all ranks.
        exchange: how texts of other ranks come here, and their gradients go back. Every rank must back-propagate with the same factor.
        block_bytes: the largest part of the similarity matrix that is held at a time.
    """
    share: Tensor = _Sigmoid.apply(image, text, scale, bias, total, exchange, block_bytes)
    return share


class _Block(NamedTuple):
    """Loss and gradients of some images against some texts."""

    loss: Tensor
    image: Float[Tensor, "b d"]
    text: Float[Tensor, "n d"]
    scale: Tensor
    bias: Tensor


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, total: int, exchange: Exchange, block_bytes: int
    ) -> Tensor:
        captions = text.shape[1]
        loss, grad_image = image.new_zeros(()), torch.zeros_like(image)
        grad_scale, grad_bias = torch.zeros_like(loss), torch.zeros_like(loss)

        def visit(texts: Tensor, is_own: bool) -> Tensor:
            nonlocal loss, grad_scale, grad_bias
            grad_text = torch.zeros_like(texts)
            for rows in torch.arange(len(image), device=image.device).split(rows_per_block(texts, block_bytes)):
                own = rows[:, None] == torch.arange(len(texts), device=image.device) // captions if is_own else None
                block = _block(image[rows], texts, scale, bias, own)
                loss, grad_scale, grad_bias = loss + block.loss, grad_scale + block.scale, grad_bias + block.bias
                grad_image[rows] += block.image
                grad_text += block.text
            return grad_text

        grad_text = exchange(text.flatten(0, 1), visit).view_as(text)
        count = total * captions
        ctx.save_for_backward(*(g / count for g in (grad_image, grad_text, grad_scale.view_as(scale), grad_bias.view_as(bias))))
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * saved for saved in ctx.saved_tensors), None, None, None)


def _block(image: Float[Tensor, "r d"], text: Float[Tensor, "n d"], scale: Tensor, bias: Tensor, own: Bool[Tensor, "r n"] | None) -> _Block:
    """`own`: which pairs belong together; None where none do."""
    products = image @ text.T
    sign = -torch.ones_like(products) if own is None else own.to(products.dtype) * 2 - 1
    answers = sign * (scale * products + bias)
    slope = -sign * torch.sigmoid(-answers)
    return _Block(
        loss=functional.softplus(-answers).sum(),
        image=scale * slope @ text,
        text=scale * slope.T @ image,
        scale=(slope * products).sum(),
        bias=slope.sum(),
    )
