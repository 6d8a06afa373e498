"""The blocks of a model, and how each is computed: compiled, or twice to save memory. Names of weights do not change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mm_core.models.batch_norm import StatisticsUntouched

_VARIANTS = 64
"""Of a block's code: towers, shapes of pieces, with and without gradients."""


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """transformers' own."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_blocks(blocks: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """`forward` of each block runs compiled. To come before what wraps it, as `checkpoint_blocks` does. Compiles at the first call.

    Block by block rather than the towers whole: the blocks of a tower are alike, so each shape is compiled once for all of them, in
    seconds, and FSDP2's hooks go around a block and stay as they are.

    Args:
        backend: torch.compile's.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)  # torch's default of 8 falls back to eager, with a warning alone
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)


def as_written() -> AbstractContextManager[object]:
    """Blocks run uncompiled until it ends: for shapes that come once or twice."""
    return torch.compiler.set_stance("force_eager")


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep only each block's input, and compute the rest again in backward."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first and the second computation of a block."""
    return nullcontext(), StatisticsUntouched(block)
