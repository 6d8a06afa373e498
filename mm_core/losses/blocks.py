"""Sums over the rows of a similarity matrix, a block of rows at a time: the matrix of a batch is never held whole.

A block's similarities are computed again in the backward pass, so memory is one block and the features, and grows with the batch, not with
its square. The towers cost so much more that the second product is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_BYTES = 128 << 20
"""Of one block of similarities."""


def rows_per_block(columns: Tensor, block_bytes: int = BLOCK_BYTES) -> int:
    return max(1, block_bytes // (columns.shape[0] * columns.element_size()))


def sum_over_rows(
    function: Callable[..., Tensor], rows: Sequence[Tensor], others: Sequence[Tensor | float], *, rows_at_a_time: int
) -> Tensor:
    """The sum of `function(*block_of_rows, *others)` over blocks of the first axis of `rows`.

    Args:
        function: of some rows to the sum of their losses; draws no random numbers.
        rows: tensors of one length.
        others: handed on as they are.
    """
    if rows[0].shape[0] <= rows_at_a_time:
        return function(*rows, *others)
    blocks = zip(*(tensor.split(rows_at_a_time) for tensor in rows), strict=True)
    return torch.stack([checkpoint(function, *block, *others, use_reentrant=False, preserve_rng_state=False) for block in blocks]).sum()
