"""Weights of another model: all, resized to another image, or those that fit."""

from __future__ import annotations

import pytest
import torch

from mm_core.models.clip import clip_tiny
from mm_core.models.family import ModelConfig, build_model
from mm_core.models.siglip import siglip_tiny
from mm_core.models.sizes import SpecialTokens
from mm_core.models.two_tower import TwoTower
from mm_core.models.warm_start import resize_positions, take_over

POSITIONS = "vision_model.embeddings.position_embedding.weight"


def built(config: ModelConfig, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(config, SpecialTokens(bos=3, eos=4, pad=0))


@pytest.mark.parametrize("config", [clip_tiny(), siglip_tiny()], ids=lambda config: config.family)
def test_a_finer_grid_sees_what_the_coarse_one_saw(config: ModelConfig) -> None:
    """Of a plain picture, twice as large, features hardly change, as each place is seen as before."""
    small, large = built(config, 0), built(config.model_copy(update={"image_size": 2 * config.image_size}), 1)
    with torch.no_grad():  # positions as training leaves them: neighbours alike
        grid = torch.linspace(-1, 1, 4)
        smooth = torch.stack([grid[:, None].expand(4, 4), grid[None].expand(4, 4)], dim=-1).reshape(16, 2)
        weight = small.state_dict()[POSITIONS]
        weight[-16:] = smooth @ torch.randn(2, weight.shape[1])
    taken = take_over(large, small.state_dict())
    assert (taken.resized, taken.fresh, taken.unused) == ((POSITIONS,), (), ())
    with torch.no_grad():
        ours = TwoTower(large).eval().image_features(torch.full((1, 128, 128, 3), 99, dtype=torch.uint8))
        theirs = TwoTower(small).eval().image_features(torch.full((1, 64, 64, 3), 99, dtype=torch.uint8))
        large.vision_model.embeddings.position_embedding.weight[-64:] = torch.randn(64, config.vision.width)
        elsewhere = TwoTower(large).eval().image_features(torch.full((1, 128, 128, 3), 99, dtype=torch.uint8))
    assert float((ours * theirs).sum()) > max(0.98, float((elsewhere * theirs).sum()))


def test_resizing_keeps_the_class_tokens_place_and_a_grid_of_its_size() -> None:
    positions = torch.randn(17, 5)
    torch.testing.assert_close(resize_positions(positions, 17), positions)
    assert resize_positions(positions, 37).shape == (37, 5)
    torch.testing.assert_close(resize_positions(positions, 37)[0], positions[0])


def test_what_does_not_fit_stays_fresh_and_is_named() -> None:
    other = clip_tiny().model_copy(update={"vocab_size": 2048})
    model, source = built(clip_tiny(), 0), built(other, 1)
    before = model.state_dict()["text_model.embeddings.token_embedding.weight"].clone()
    taken = take_over(model, source.state_dict())
    assert taken.fresh == taken.unused == ("text_model.embeddings.token_embedding.weight",)
    torch.testing.assert_close(model.state_dict()[taken.fresh[0]], before)
    torch.testing.assert_close(model.state_dict()["visual_projection.weight"], source.state_dict()["visual_projection.weight"])
    printed = str(taken).splitlines()
    assert printed[1:] == [f"1 {what}: text_model.embeddings.token_embedding.weight" for what in ("fresh", "not used")]
    assert printed[0].startswith(f"{len(taken.loaded)} taken over: ")
    layers = clip_tiny().vision.layers
    assert f"vision_model.encoder.layers.*.mlp.fc1.weight ({layers})" in printed[0]
