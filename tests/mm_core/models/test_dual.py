"""Two towers from folders as the hub has them: joined, fed, exported; and those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertModel,
    VisionTextDualEncoderModel,
)

from mm_core.bundle import load_bundle, write_bundle
from mm_core.errors import ConfigError
from mm_core.models.dual import DualConfig, build_dual, resolve_dual, tower_weights
from mm_core.models.tokenizer import load_tokenizer, special_tokens
from mm_core.models.two_tower import ImageTextBatch, Tower, TwoTower
from mm_core.models.warm_start import take_over
from mm_core.training.cost import sample_cost
from tests.mm_core.models.hub import write_hub

TEXTS = ["a red circle", "a blue square above a red circle"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


def config_of(hub: Path, vision: str = "vit", text: str = "bert", **changes: Any) -> DualConfig:
    """As a worker gets it: resolved, and from JSON."""
    sizes = {"image_size": 32, "context_length": 12, "vocab_size": 1, "embed_dim": 16} | changes
    config = DualConfig(vision_source=str(hub / vision), text_source=str(hub / text), **sizes)
    return DualConfig.model_validate_json(resolve_dual(config).model_dump_json())


def joined(hub: Path, config: DualConfig) -> TwoTower:
    """With the towers' weights."""
    torch.manual_seed(1)
    model = build_dual(config, special_tokens(load_tokenizer(hub / "bert")))
    take_over(model, tower_weights(config))
    return TwoTower(model, mean=config.image_mean, std=config.image_std)


def batch() -> ImageTextBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[[2, 5, 6, 8, 3, 0, 0, 0, 0, 0, 0, 0]], [[2, 5, 7, 9, 10, 5, 6, 8, 3, 0, 0, 0]]])
    return ImageTextBatch(torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8, generator=generator), ids)


@pytest.mark.parametrize(
    ("vision", "text", "fresh"),
    [
        ("vit", "bert", set()),
        ("clip", "bert", set()),
        ("vit", "clip", set()),
        ("dinov2", "roberta", {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}),
    ],
)
def test_towers_keep_their_weights_and_every_trained_parameter_has_a_gradient(hub: Path, vision: str, text: str, fresh: set[str]) -> None:
    config = config_of(hub, vision, text)
    model = build_dual(config, special_tokens(load_tokenizer(hub / "bert")))
    taken = take_over(model, tower_weights(config))
    assert {*taken.fresh} == fresh | {"logit_scale", "visual_projection.weight", "text_projection.weight"}
    assert not taken.unused
    wrapped = TwoTower(model)
    wrapped.attend_for(torch.device("cpu"))
    output = wrapped(batch())
    (output.image_features.sum() + output.text_features.sum() + output.logit_scale).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_towers_own_pooled_vector_is_what_is_projected(hub: Path) -> None:
    """BERT's, with the mask that its tokenizer gives."""
    model, tower = joined(hub, config_of(hub)).eval(), BertModel.from_pretrained(hub / "bert").eval()
    ids = batch().input_ids[:, 0]
    with torch.no_grad():
        pooled = tower(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        expected = torch.nn.functional.normalize(model.model.text_projection(pooled), dim=-1)
        for kernel in ("eager", "sdpa"):
            model.attend(kernel)
            torch.testing.assert_close(model.text_features(ids), expected, atol=1e-5, rtol=1e-4)


def test_a_locked_tower_leaves_its_projection_to_be_trained(hub: Path) -> None:
    model = joined(hub, config_of(hub))
    model.freeze(Tower.VISION)
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {
        *("text_model", "text_projection", "visual_projection", "logit_scale")
    }


def test_patches_are_dropped_of_a_vit(hub: Path) -> None:
    model, seen = joined(hub, config_of(hub)).train(), []
    model.drop_patches(0.75)
    model.model.vision_model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    model.image_features(batch().images[:, 0])
    assert seen == [1 + 4]


def test_a_finer_grid_takes_the_position_embeddings_resized(hub: Path) -> None:
    config = config_of(hub, image_size=64)
    model = build_dual(config, special_tokens(load_tokenizer(hub / "bert")))
    taken = take_over(model, tower_weights(config))
    assert taken.resized == ("vision_model.embeddings.position_embeddings",)
    assert model.vision_model.embeddings.position_embeddings.shape == (1, 65, 32)


def test_a_bundle_of_it_loads_anywhere_without_the_towers(hub: Path, tmp_path: Path) -> None:
    config, tokenizer = config_of(hub), load_tokenizer(hub / "bert")
    config = config.model_copy(update={"vocab_size": len(tokenizer), "vision_source": "gone", "text_source": "gone"})
    model = joined(hub, config_of(hub)).model
    write_bundle(tmp_path / "dual", model=model, tokenizer=tokenizer, config=config, recipe="dual", data_fingerprint="f", metrics={})
    bundle, theirs = load_bundle(tmp_path / "dual"), VisionTextDualEncoderModel.from_pretrained(tmp_path / "dual").eval()
    assert (bundle.embed_dim, bundle.image_size, bundle.context_length) == (16, 32, 12)
    tokens = bundle.tokenizer(TEXTS, padding="max_length", max_length=12, return_tensors="pt")
    images = batch().images[:, 0]
    pixels = (images / 255 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
    with torch.no_grad():
        words = torch.nn.functional.normalize(theirs.get_text_features(**tokens).pooler_output, dim=-1)
        pictures = torch.nn.functional.normalize(theirs.get_image_features(pixel_values=pixels.permute(0, 3, 1, 2)).pooler_output, dim=-1)
    np.testing.assert_allclose(bundle.text_features(TEXTS), words, atol=1e-5)
    np.testing.assert_allclose(bundle.image_features(images.numpy()), pictures, atol=1e-5)
    assert bundle.logit_scale == pytest.approx(theirs.logit_scale.exp().item())


def test_what_a_step_costs_is_counted(hub: Path) -> None:
    cost = sample_cost(config_of(hub))
    assert cost.forward_flops > 2 * 17 * 2 * 12 * 32**2  # seventeen tokens, two layers of 12 w² weights
    assert cost.block_parameters == pytest.approx(12 * 32**2 - 4 * 32 * 32, rel=0.1)


@pytest.mark.parametrize(
    ("vision", "text", "changes", "message"),
    [
        ("resnet", "bert", {}, r"\(resnet\) and .*\(bert\) cannot be joined.*'ResNetConfig' object has no attribute 'hidden_size'"),
        ("vit", "distilbert", {}, r"\(distilbert\) cannot be joined.*no attribute 'pooler_output'"),
        ("wav2vec2", "bert", {}, r"\(wav2vec2\) and .* cannot be joined"),
        ("vit", "wav2vec2", {"vocab_size": 1}, r"\(wav2vec2\) cannot be joined"),
        ("vit", "vit", {}, r"model\.text_source: .*vit is a vit model, which reads no tokens"),
        ("nothing", "bert", {}, r"model\.vision_source: no model at .*nothing"),
        ("vit", "bert", {"context_length": 19}, r"context_length 19 is above what .* has places for, 18"),
    ],
)
def test_towers_that_cannot_be_joined_are_refused(hub: Path, vision: str, text: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dual(config_of(hub, vision, text, **changes), special_tokens(load_tokenizer(hub / "bert")))


def test_another_tokenizer_and_sources_that_nobody_read_are_refused(hub: Path) -> None:
    tokens = special_tokens(load_tokenizer(hub / "bert"))
    with pytest.raises(ConfigError, match=r"the tokenizer has 99 tokens, and the text tower of .* knows \d+: leave tokenizer\.source out"):
        build_dual(config_of(hub).model_copy(update={"vocab_size": 99}), tokens)
    with pytest.raises(ConfigError, match=r"once model\.vision_source and model\.text_source are read"):
        build_dual(config_of(hub).model_copy(update={"towers": None}), tokens)
