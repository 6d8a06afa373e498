"""What a step of a model costs, counted on the meta device: nothing is allocated, nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from mm_core.data.masking import MaskingConfig
from mm_core.distributed import GlobalBatch
from mm_core.models.dvae import DiscreteVae, DvaeBatch, DvaeConfig
from mm_core.models.family import AnyModelConfig, ModelConfig, outline
from mm_core.models.flava import FlavaConfig
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import LabelledBatch, MaskedImages, MaskedTexts, PairBatch
from mm_core.models.fused_classifier import ClassHead, FusedClassifier
from mm_core.models.two_tower import ImageTextBatch, Tower, TwoTower
from mm_core.objectives.classify import ClassifyConfig
from mm_core.optim import matrices_of

_SAMPLES = 8
"""Counted on; the figures are linear in it."""


@dataclass(frozen=True)
class SampleCost:
    """Of one sample, its views and texts, in 16-bit activations."""

    parameters: int
    """Of the whole model."""
    trained_parameters: int
    """Those that have gradients."""
    block_parameters: int
    """Of its largest block, which sharding gathers at a time."""
    matrix_parameters: int
    """Trained ones in the matrices of its blocks, which Muon updates."""
    forward_flops: float
    backward_flops: float
    """What checkpointing computes again included."""
    activation_bytes: float
    """Kept from forward for backward, under autocast on a GPU: inputs of LayerNorm in fp32, attention without its matrix, as fused kernels
    have it."""


def sample_cost(
    config: AnyModelConfig,
    *,
    views: int = 1,
    captions: int = 1,
    frozen: Tower | None = None,
    patch_dropout: float = 0.0,
    checkpointing: bool = False,
    classify: ClassifyConfig | None = None,
) -> SampleCost:
    """Products of matrices and convolutions, as `torch.utils.flop_counter` counts them, two operations for each multiply-add.

    Args:
        frozen: of two towers one that is not trained.
        patch_dropout: share of an image's patches that two towers leave out.
        classify: what a FLAVA model is fine-tuned for, if it is.
    """
    model, batch = _model_and_batch(config, views, captions, classify)
    if frozen is not None:
        model.freeze(frozen)
    if patch_dropout:
        model.drop_patches(patch_dropout)
    if checkpointing:
        model.checkpoint_activations()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}) as counter:
        output = model(batch)
        forward = counter.get_total_flops()
        torch.stack([tensor.float().sum() for tensor in _tensors(output)]).sum().backward()
        total = counter.get_total_flops()
    kept = _Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor), _AsOnGpu():
        model(batch)
    return SampleCost(
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        block_parameters=max(sum(p.numel() for p in block.parameters()) for block in model.blocks()),
        matrix_parameters=sum(p.numel() for p in matrices_of(model.blocks()) if p.requires_grad),
        forward_flops=forward / _SAMPLES,
        backward_flops=(total - forward) / _SAMPLES,
        activation_bytes=kept.bytes / _SAMPLES,
    )


def teacher_flops(model: PreTrainedModel, student: ModelConfig, *, views: int = 1, captions: int = 1) -> float:
    """Operations of two towers on one of the student's samples, forward alone. `model` is on the meta device."""
    with torch.device("meta"):
        towers = TwoTower(model).to(torch.bfloat16)
    towers.attend("sdpa")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        towers(_pairs(student, views, captions))
    return counter.get_total_flops() / _SAMPLES


def _pairs(config: ModelConfig, views: int, captions: int) -> ImageTextBatch:
    with torch.device("meta"):
        images = torch.zeros(_SAMPLES, views, config.image_size, config.image_size, 3, dtype=torch.uint8)
        return ImageTextBatch(images, torch.zeros(_SAMPLES, captions, config.context_length, dtype=torch.long))


def _model_and_batch(config: AnyModelConfig, views: int, captions: int, classify: ClassifyConfig | None) -> tuple[Any, Any]:
    """On the meta device. Of a model for several tasks the dearest of its steps, that of pairs."""
    inner, whole = outline(config), GlobalBatch((_SAMPLES,))
    with torch.device("meta"):
        images = torch.zeros(_SAMPLES, views, config.image_size, config.image_size, 3, dtype=torch.uint8)
        match config:
            case DvaeConfig():
                return DiscreteVae(inner, config), DvaeBatch(images[:, 0], 1.0, 1.0, whole)
            case FlavaConfig() if classify is not None:
                classifier = FusedClassifier(inner, ClassHead(inner.config, classify.num_classes, classify.sides)).to(torch.bfloat16)
                classifier.attend("sdpa")
                shown = classify.sides.modalities
                ids = torch.zeros(_SAMPLES, config.context_length, dtype=torch.long)
                labels = torch.zeros(_SAMPLES, dtype=torch.long)
                return classifier, LabelledBatch(images[:, 0] if "image" in shown else None, ids if "text" in shown else None, labels)
            case FlavaConfig():
                fused = Fused(inner).to(torch.bfloat16)
                ids = torch.zeros(_SAMPLES, config.context_length, dtype=torch.long)
                rows = [torch.zeros(int(share * _SAMPLES * n), dtype=torch.long) for share, n in _masked(config)]
                mask = torch.zeros(_SAMPLES, config.patches, dtype=torch.bool)
                pairs = PairBatch(MaskedImages(images[:, 0], mask, rows[0]), MaskedTexts(ids, ids, rows[1]), torch.zeros(_SAMPLES), whole)
                fused.attend("sdpa")
                return fused, pairs
            case _:
                towers = TwoTower(inner).to(torch.bfloat16)
                towers.attend("sdpa")
                return towers, _pairs(config, views, captions)


def _masked(config: FlavaConfig) -> tuple[tuple[float, int], tuple[float, int]]:
    """Share and number of an image's patches and a text's tokens, hidden as by default."""
    usual = MaskingConfig()
    return (usual.image_share, config.patches), (usual.text_share, config.context_length)


def _tensors(output: Any) -> list[Tensor]:
    """Those with a gradient, at any depth."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if is_dataclass(output):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    return [tensor for value in output.values() for tensor in _tensors(value)] if isinstance(output, dict) else []


class _AsOnGpu(TorchFunctionMode):
    """What autocast on a GPU calls, where the meta device takes something dearer or cheaper: its attention has the whole matrix, in fp32,
    and its LayerNorm stays in 16 bits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        if func is functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """
    Shape:
        query, key, value: (samples, heads, tokens, width of a head), and so is what comes back.
    """
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return cast(Tensor, flash(query, key, value, dropout_p, is_causal, scale=scale)[0])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return cast(Tensor, efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0])


def _layer_norm(input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return functional.layer_norm(input.float(), shape, weight, bias, eps).to(input.dtype)


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
