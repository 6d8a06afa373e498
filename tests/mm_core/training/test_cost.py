"""Costs beside the published ones, and beside formulas."""

from __future__ import annotations

import pytest
import torch

from mm_core.models.clip import clip_tiny, clip_vit_b16, clip_vit_b32, clip_vit_l14
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.flava import flava_base
from mm_core.models.siglip import siglip_vit_b16
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import Tower, TwoTower
from mm_core.optim import OptimizerConfig, OptimizerKind, build_optimizer, kept_numbers
from mm_core.training.cost import sample_cost


def transformer_flops(tokens: int, width: int, layers: int) -> float:
    """24 n w² + 4 n² w for each layer, two operations for a multiply-add (Kaplan et al. 2020, table 1, without biases)."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def test_a_forward_pass_costs_what_the_formulas_say() -> None:
    cost = sample_cost(clip_vit_b32())
    towers = transformer_flops(50, 768, 12) + transformer_flops(77, 512, 12)
    patches, projections = 2 * 49 * 3 * 32**2 * 768, 2 * (768 * 512 + 512 * 512)
    assert cost.forward_flops == pytest.approx(towers + patches + projections, rel=1e-3)
    assert cost.parameters == 151_277_313
    assert cost.backward_flops == pytest.approx(2 * cost.forward_flops, rel=0.02)  # the images need no gradient
    assert cost.block_parameters == pytest.approx(12 * 768**2, rel=0.01)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_an_optimizer_keeps_what_is_counted(kind: OptimizerKind) -> None:
    config = clip_tiny()
    towers = TwoTower(build_model(config, SpecialTokens(bos=0, eos=config.vocab_size - 1, pad=1)))
    optimizer = build_optimizer(towers, OptimizerConfig(kind=kind, lr=1e-3), blocks=towers.blocks())
    for parameter in towers.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.numel() for state in optimizer.state.values() for name, value in state.items() if name != "step")
    cost = sample_cost(config)
    assert kept_numbers(kind, parameters=cost.parameters, matrices=cost.matrix_parameters) == held


def test_the_published_cost_of_l14() -> None:
    """open_clip's model profile: 175.33 GFLOPs for ViT-L-14."""
    assert sample_cost(clip_vit_l14()).forward_flops == pytest.approx(175.33e9, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "samples", "gigabytes"),
    [(clip_vit_l14(), 128, 49.8), (clip_vit_b16(), 512, 59.8), (siglip_vit_b16(), 512, 53.7)],
    ids=["l14", "b16", "siglip"],
)
def test_memory_is_what_an_h200_took(config: ModelConfig, samples: int, gigabytes: float) -> None:
    """Weights, gradients and AdamW's state in fp32, and what a step keeps, beside benchmarks/RESULTS.md's peaks of uncompiled steps."""
    cost = sample_cost(config)
    counted = 16 * cost.parameters + samples * cost.activation_bytes
    assert counted / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_checkpointing_keeps_little_and_computes_again() -> None:
    whole, spared = sample_cost(clip_vit_b32()), sample_cost(clip_vit_b32(), checkpointing=True)
    assert spared.activation_bytes < whole.activation_bytes / 10
    assert spared.forward_flops == whole.forward_flops
    assert 0.5 * whole.forward_flops < spared.backward_flops - whole.backward_flops < whole.forward_flops


def test_views_and_texts_cost_their_towers_again() -> None:
    one, more = sample_cost(clip_vit_b32()), sample_cost(clip_vit_b32(), views=2, captions=3)
    vision, text = transformer_flops(50, 768, 12), transformer_flops(77, 512, 12)
    assert more.forward_flops - one.forward_flops == pytest.approx(vision + 2 * text, rel=0.02)


def test_a_frozen_tower_costs_its_forward_pass_alone() -> None:
    """LiT: of the image tower no gradients, no moments, nothing kept for backward."""
    whole, locked = sample_cost(clip_vit_b32()), sample_cost(clip_vit_b32(), frozen=Tower.VISION)
    assert locked.forward_flops == whole.forward_flops
    assert locked.backward_flops == pytest.approx(2 * transformer_flops(77, 512, 12), rel=0.01)
    assert locked.parameters - locked.trained_parameters == pytest.approx(87.85e6, rel=1e-3)  # open_clip's profile of the image tower
    assert whole.matrix_parameters - locked.matrix_parameters == 12 * 12 * 768**2
    assert locked.activation_bytes == pytest.approx(whole.activation_bytes * 77 * 512 / (77 * 512 + 50 * 768), rel=0.1)


def test_patches_that_are_left_out_are_not_computed() -> None:
    """FLIP's half: the class token and 24 of 49 patches; all are embedded."""
    whole, half = sample_cost(clip_vit_b32()), sample_cost(clip_vit_b32(), patch_dropout=0.5)
    spared = transformer_flops(50, 768, 12) - transformer_flops(1 + 24, 768, 12)
    assert whole.forward_flops - half.forward_flops == pytest.approx(spared, rel=0.01)
    assert half.activation_bytes < 0.8 * whole.activation_bytes


def test_flavas_pairs_cost_their_encoders_and_a_codebook() -> None:
    """Whole and masked sides through both towers, pairs, masked pairs and negatives through the fusion: 171 of 226 GFLOP; the rest is the
    heads and DALL-E's encoder, 51 of them."""
    cost = sample_cost(flava_base())
    encoders = 2 * sum(transformer_flops(tokens, 768, 12) for tokens in (197, 77)) + 3 * transformer_flops(275, 768, 6)
    assert encoders == pytest.approx(170.6e9, rel=1e-3)
    assert 1.3 * encoders < cost.forward_flops < 1.4 * encoders
    assert cost.backward_flops < 1.6 * cost.forward_flops  # the codebook has none
