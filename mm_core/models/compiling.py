"""torch.compile of a model's blocks.

Block by block rather than the towers whole: the blocks of a tower are alike, so each shape is compiled once for all of them, which takes
seconds; hooks of FSDP2 and activation checkpointing go around a block and stay as they are; names of weights do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_VARIANTS = 64
"""Of a block's code: towers, shapes of pieces, with and without gradients."""


def compile_blocks(blocks: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """`forward` of each block runs compiled. To come before what wraps it, as activation checkpointing does. Compiles at the first call.

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
