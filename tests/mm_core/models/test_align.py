"""ALIGN's size, its attention and statistics, what it refuses, and a bundle of it that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AlignModel

from mm_core.bundle import MANIFEST, init_from, load_bundle, write_bundle
from mm_core.errors import BundleError, ConfigError
from mm_core.models.align import AlignConfig, EfficientNetConfig, align_base, align_tiny
from mm_core.models.batch_norm import batch_norms
from mm_core.models.family import build_model, parameter_count
from mm_core.models.sizes import SpecialTokens
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.models.two_tower import ImageTextBatch, Tower, TwoTower
from mm_core.training.cost import sample_cost
from mm_core.training.ema import WeightMean

TOKENS = SpecialTokens(bos=3, eos=4, pad=0)
TEXTS = ["a red circle", "a blue square above a red circle", "a"]


def towers(**changes: Any) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(build_model(align_tiny().model_copy(update=changes), TOKENS))


def batch(samples: int = 3) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (samples, 1, 32), generator=generator)
    ids[:, 0, 20:] = 0
    return ImageTextBatch(torch.randint(0, 256, (samples, 1, 64, 64, 3), dtype=torch.uint8, generator=generator), ids)


def test_parameters_are_the_published_models() -> None:
    """172 M: the count of kakaobrain/align-base."""
    assert parameter_count(align_base()) == 172_117_841


def test_attention_is_the_same_by_either_kernel_and_sees_no_padding() -> None:
    model, ids = towers().eval(), batch().input_ids[:, 0]
    with torch.no_grad():
        model.attend("eager")
        eager = model.text_features(ids)
        model.attend("sdpa")
        torch.testing.assert_close(model.text_features(ids), eager, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.text_features(ids[:, :24]), eager, atol=1e-5, rtol=1e-4)
        theirs = model.model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        torch.testing.assert_close(torch.nn.functional.normalize(theirs), eager, atol=1e-5, rtol=1e-4)


def test_checkpointing_computes_twice_and_counts_once() -> None:
    """The same gradients, and the same running statistics."""
    plain, spared = towers().double(), towers().double()
    spared.checkpoint_activations()
    for model in (plain, spared):
        output = model(batch())
        (output.image_features.sum() + output.text_features.sum()).backward()
    torch.testing.assert_close(dict(spared.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
    assert all(norm.num_batches_tracked == 1 for norm in batch_norms(spared))
    for (name, one), (_, other) in zip(plain.named_parameters(), spared.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)


def test_a_locked_image_tower_computes_as_in_evaluation() -> None:
    model = towers()
    assert model.depends_on_batch
    model.freeze(Tower.VISION)
    model.train()
    assert not model.depends_on_batch
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    alone = torch.cat([model.image_features(image) for image in batch().images])
    torch.testing.assert_close(model.image_features(batch().images[:, 0]), alone)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {
        "text_model",
        "text_projection",
        "temperature",
    }


def test_every_trained_parameter_has_a_gradient() -> None:
    """DDP waits for each."""
    model = towers()
    output = model(batch())
    (output.image_features.sum() + output.text_features.sum() + output.logit_scale).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_mean_of_the_weights_has_a_mean_of_their_statistics() -> None:
    model = towers()
    mean, name = WeightMean(model, 0.5), "model.vision_model.embeddings.batchnorm.running_mean"
    model(batch())
    mean.update(1000)
    torch.testing.assert_close(mean.state[name], model.get_buffer(name) / 2)


def test_patches_are_what_an_efficientnet_has_not() -> None:
    with pytest.raises(ConfigError, match=r"patch_dropout leaves patches of a vision transformer out, and align_vision_model is none"):
        towers().drop_patches(0.5)


def test_what_a_step_costs_is_counted() -> None:
    """EfficientNet-B7 at 600 pixels takes 37 G multiply-adds (Tan and Le 2019, table 2); BERT-base has 85 M weights for each token."""
    config = align_base()
    large = sample_cost(config.model_copy(update={"image_size": 600}))
    text = 2 * 85e6 * config.context_length
    assert large.forward_flops == pytest.approx(74e9 + text, rel=0.05)
    assert large.backward_flops == pytest.approx(2 * large.forward_flops, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 96}, r"embed_dim 96 of an align model is what its image tower ends with, 128 channels"),
        ({"context_length": 33}, r"context_length 33 is above model\.text_positions 32"),
        ({"vocab_size": 4}, r"vocab_size 4 does not hold"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        towers(**changes)


def test_a_tokenizer_without_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match="no padding token of its own"):
        build_model(align_tiny(), SpecialTokens(bos=3, eos=4, pad=4))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained a little, so that running statistics are no longer those of a fresh model."""
    folder = tmp_path_factory.mktemp("align") / "tiny"
    tokenizer = train_bpe(TEXTS * 10, vocab_size=300, context_length=32)
    config = align_tiny().model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    model = build_model(config, special_tokens(tokenizer))
    TwoTower(model)(batch())
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe="align-tiny", data_fingerprint="f", metrics={})
    return folder


def test_a_bundle_of_it_loads_anywhere(written: Path) -> None:
    bundle, theirs = load_bundle(written), AlignModel.from_pretrained(written).eval()
    assert (bundle.embed_dim, bundle.image_size, bundle.context_length) == (128, 64, 32)
    tokens = bundle.tokenizer(TEXTS, padding="max_length", max_length=32, return_tensors="pt")
    images = batch().images[:, 0]
    with torch.no_grad():
        words = torch.nn.functional.normalize(theirs.get_text_features(**tokens).pooler_output, dim=-1)
        pixels = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
        pictures = torch.nn.functional.normalize(theirs.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    np.testing.assert_allclose(bundle.text_features(TEXTS), words, atol=1e-5)
    np.testing.assert_allclose(bundle.image_features(images.numpy()), pictures, atol=1e-5)
    assert bundle.logit_scale == pytest.approx(1 / float(theirs.temperature.detach()))
    assert "attention_mask=texts.attention_mask" in (written / "README.md").read_text()


def test_a_folder_that_mm_did_not_write_is_fed_as_its_preprocessing_says(written: Path, tmp_path: Path) -> None:
    """The published model's configuration states 600 pixels, its preprocessing 289."""
    plain = Path(shutil.copytree(written, tmp_path / "plain"))
    (plain / MANIFEST).unlink()
    (plain / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3}))
    bundle = load_bundle(plain)
    assert (bundle.image_size, bundle.context_length) == (48, 32)
    assert bundle.image_features(np.zeros((1, 48, 48, 3), np.uint8)).shape == (1, 128)


def test_training_starts_from_it_and_not_from_another_size(written: Path) -> None:
    start = load_bundle(written)
    assert start.manifest is not None
    config = start.manifest.model
    assert isinstance(config, AlignConfig)
    model = build_model(config, special_tokens(start.tokenizer))
    init_from(model, str(written), tokenizer=start.tokenizer)
    torch.testing.assert_close(model.state_dict(), start.model.state_dict(), rtol=0, atol=0)
    deeper = config.model_copy(update={"vision": EfficientNetConfig(width=0.4, depth=1.0)})
    with pytest.raises(BundleError, match=r"vision_config\.num_hidden_layers is 10 there, 16 here"):
        init_from(build_model(deeper, special_tokens(start.tokenizer)), str(written))
