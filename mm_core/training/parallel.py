"""A model over several ranks: replicated (DDP) or sharded (FSDP2). Gradients end up the same: the mean over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mm_core.models.batch_norm import synchronise_batch_norms
from mm_core.training.clock import Phase, StepClock, timed_all_reduce


class Parallelism(StrEnum):
    DDP = "ddp"
    """Every rank holds the whole model; gradients are averaged while backward runs."""
    FSDP = "fsdp"
    """Weights, gradients and optimiser state are divided among the ranks; a block's weights are gathered when it is computed (FSDP2)."""


class Parallel(Protocol):
    """What a step needs of a model over several ranks."""

    module: nn.Module
    """The model itself."""

    def __call__(self, batch: Any) -> Any: ...

    def gradients_stay_local(self, wanted: bool) -> AbstractContextManager[object]:
        """Around forward and backward of all pieces of a batch but the last: gradients need not be exchanged yet."""
        ...

    def finish_gradients(self) -> None:
        """After the last backward pass: what it left undone."""
        ...


class Alone:
    """One rank: nothing is exchanged, and nothing copied for it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.module = model.to(device)

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    def gradients_stay_local(self, wanted: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def finish_gradients(self) -> None:
        """Nothing is left undone."""


class Replicated:
    """DDP."""

    def __init__(self, model: nn.Module, device: torch.device, clock: StepClock, *, in_parts: bool) -> None:
        device_ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # what follows it came with torch 2.13
            self._parallel = DistributedDataParallel(
                model.to(device),
                device_ids=device_ids,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=in_parts,
            )
        self._parallel.register_comm_hook(clock, timed_all_reduce)
        self.module = model

    def __call__(self, batch: Any) -> Any:
        return self._parallel(batch)

    def gradients_stay_local(self, wanted: bool) -> AbstractContextManager[object]:
        return self._parallel.no_sync() if wanted else nullcontext()

    def finish_gradients(self) -> None:
        """Nothing: DDP does all of it in backward."""


class Sharded:
    """FSDP2, a transformer block at a time. Gradients are exchanged after every piece of a batch: kept whole until the last, they would
    need the memory that sharding is there to save."""

    def __init__(self, model: nn.Module, device: torch.device, clock: StepClock, *, blocks: Sequence[nn.Module]) -> None:
        # torch warns of outputs that are views, as in-place operations on them would go wrong; objectives have none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._clock = clock
        self.module = model.to(device)
        # FSDP2 does not shard scalars: each rank has its own, and they are averaged, in one order on all ranks.
        scalars = [p for p in model.parameters() if p.ndim == 0]
        for block in blocks:
            fully_shard(block)
        fully_shard(model, ignored_params=set(scalars))
        self._scalars = [p for p in scalars if p.requires_grad]

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    def gradients_stay_local(self, wanted: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def finish_gradients(self) -> None:
        with self._clock.phase(Phase.COLLECTIVE):
            for scalar in self._scalars:
                if scalar.grad is not None:
                    dist.all_reduce(scalar.grad)
                    scalar.grad /= dist.get_world_size()


def parallelise(
    model: nn.Module, kind: Parallelism, device: torch.device, clock: StepClock, *, blocks: Sequence[nn.Module], in_parts: bool = False
) -> Parallel:
    """`model` on its device, over all ranks.

    Args:
        blocks: the modules that are sharded one by one.
        in_parts: whether there are steps that train a part of it only, the same on all ranks.
    """
    if dist.get_world_size() > 1:
        synchronise_batch_norms(model)
    match kind:
        case Parallelism.DDP if dist.get_world_size() == 1:
            return Alone(model, device)
        case Parallelism.DDP:
            return Replicated(model, device, clock, in_parts=in_parts)
        case Parallelism.FSDP:
            return Sharded(model, device, clock, blocks=blocks)


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward left gathered: the next pass gathers them as they are then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def clip_gradients(parameters: Iterator[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`. Returns the norm before, the same on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    norms = [_norm(some) for some in (sharded, whole) if some]
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return total


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
