"""What is done to towers for training: freezing one, dropping patches."""

from __future__ import annotations

import pytest
import torch

from mm_core.models.clip import clip_tiny
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.siglip import siglip_tiny
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import Tower, TwoTower

FAMILIES = {"clip": clip_tiny(), "siglip": siglip_tiny()}


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return FAMILIES[request.param]


def towers(config: ModelConfig) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(build_model(config, SpecialTokens(bos=3, eos=4, pad=0)))


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tower", list(Tower))
def test_a_frozen_tower_gets_no_gradient_and_the_other_does(config: ModelConfig, tower: Tower) -> None:
    model = towers(config)
    model.freeze(tower)
    ids = torch.randint(5, 100, (2, 32))
    ids[:, -1] = 4
    (model.image_features(images(2)) @ model.text_features(ids).T * model.logit_scale).sum().backward()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    left = {"vision": {"text_model", "text_projection"}, "text": {"vision_model", "visual_projection"}}[tower]
    assert trained == {name for name in {n.split(".")[1] for n, _ in model.named_parameters()} if name in left | {"logit_scale"}}


def test_patches_are_dropped_in_training_alone(config: ModelConfig) -> None:
    model, seen = towers(config), []
    whole = model.eval().image_features(images(3)).detach()
    model.drop_patches(0.75)
    model.model.vision_model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output[0].shape[1]))
    torch.testing.assert_close(model.eval().image_features(images(3)).detach(), whole)
    one, other = (model.train().image_features(images(3)).detach() for _ in range(2))
    assert not torch.allclose(one, other)  # others each time
    tokens = 16 + (config.family == "clip")
    assert seen == [tokens, tokens - 12, tokens - 12]


def test_the_class_token_and_the_order_of_nothing_else_matter() -> None:
    """Of a picture whose patches are all alike, any quarter gives the same patches, but for their places."""
    model = towers(FAMILIES["clip"]).train()
    embeddings = model.model.vision_model.embeddings
    embeddings.position_embedding.weight.data[1:] = 0
    model.drop_patches(0.5)
    flat = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    torch.testing.assert_close(model.image_features(flat), model.image_features(flat))
