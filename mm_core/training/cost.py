"""What a step of a two-tower model costs, counted on the meta device: nothing is allocated, nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mm_core.models.family import ModelConfig, outline
from mm_core.models.two_tower import ImageTextBatch, TwoTower
from mm_core.optim import matrices_of

_SAMPLES = 8
"""Counted on; the figures are linear in it."""


@dataclass(frozen=True)
class SampleCost:
    """Of one sample, its views and texts, in 16-bit activations."""

    parameters: int
    """Of the whole model."""
    block_parameters: int
    """Of its largest block, which sharding gathers at a time."""
    matrix_parameters: int
    """In the matrices of its blocks, which Muon updates."""
    forward_flops: float
    backward_flops: float
    """What checkpointing computes again included."""
    activation_bytes: float
    """Kept from forward for backward. Attention without its matrix, as fused kernels have it."""


def sample_cost(config: ModelConfig, *, views: int = 1, captions: int = 1, checkpointing: bool = False) -> SampleCost:
    """Products of matrices and convolutions, as `torch.utils.flop_counter` counts them, two operations for each multiply-add."""
    model = outline(config)
    with torch.device("meta"):
        towers = TwoTower(model).to(torch.bfloat16)
        images = torch.zeros(_SAMPLES, views, config.image_size, config.image_size, 3, dtype=torch.uint8)
        batch = ImageTextBatch(images, torch.zeros(_SAMPLES, captions, config.context_length, dtype=torch.long))
    towers.attend("sdpa")
    if checkpointing:
        towers.checkpoint_activations()
    kept = _Kept(towers)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}) as counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            output = towers(batch)
        forward = counter.get_total_flops()
        (output.image_features.sum() + output.text_features.sum()).backward()
        total = counter.get_total_flops()
    return SampleCost(
        parameters=sum(p.numel() for p in towers.parameters()),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in towers.blocks()),
        matrix_parameters=sum(p.numel() for p in matrices_of(towers.blocks())),
        forward_flops=forward / _SAMPLES,
        backward_flops=(total - forward) / _SAMPLES,
        activation_bytes=kept.bytes / _SAMPLES,
    )


def _convolution_backward_flops(
    grad_output: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: object = None
) -> int:
    """From shapes. As much as forward for each gradient that is asked for; torch's own count takes no notice of groups, and so counts a
    depthwise convolution's as often as it has channels."""
    input_wanted, weight_wanted, _ = rest[-1]
    return 2 * math.prod(grad_output) * math.prod(weight[1:]) * (input_wanted + weight_wanted)


class _Kept:
    """Storages that backward needs, each counted once, weights aside."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages[storage._cdata] = storage  # held, so that no later one takes its place
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())
