"""SigLIP's sizes, its start, and a bundle of it that transformers loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipModel

from mm_core.bundle import load_bundle, write_bundle
from mm_core.errors import ConfigError
from mm_core.models.family import build_model, parameter_count
from mm_core.models.siglip import siglip_tiny, siglip_vit_b16
from mm_core.models.sizes import SpecialTokens
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.models.two_tower import ImageTextBatch, TwoTower

TEXTS = ["a red circle", "a blue square above a red circle"]


def test_parameters_are_the_published_models() -> None:
    """203 M: the count of google/siglip-base-patch16-224."""
    assert parameter_count(siglip_vit_b16()) == 203_155_970


def test_temperature_and_bias_start_as_in_the_paper() -> None:
    model = TwoTower(build_model(siglip_tiny(), SpecialTokens(bos=3, eos=4, pad=0)))
    ids = torch.randint(5, 100, (2, 1, 32))
    with torch.no_grad():
        output = model(ImageTextBatch(torch.zeros(2, 1, 64, 64, 3, dtype=torch.uint8), ids))
    assert float(output.logit_scale) == pytest.approx(10)
    assert output.logit_bias is not None
    assert float(output.logit_bias.detach()) == -10


def test_the_joint_space_is_the_image_towers() -> None:
    with pytest.raises(ConfigError, match=r"embed_dim 64 of a siglip model is its model\.vision\.width, 128"):
        build_model(siglip_tiny().model_copy(update={"embed_dim": 64}), SpecialTokens(bos=3, eos=4, pad=0))


def test_a_bundle_of_it_loads_anywhere(tmp_path: Path) -> None:
    config = siglip_tiny()
    tokenizer = train_bpe(TEXTS * 10, vocab_size=300, context_length=config.context_length)
    config = config.model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    model = build_model(config, special_tokens(tokenizer))
    write_bundle(
        tmp_path / "siglip", model=model, tokenizer=tokenizer, config=config, recipe="siglip-tiny", data_fingerprint="f", metrics={}
    )

    bundle, theirs = load_bundle(tmp_path / "siglip"), SiglipModel.from_pretrained(tmp_path / "siglip").eval()
    assert bundle.embed_dim == config.embed_dim
    ids = tokenizer(TEXTS, padding="max_length", max_length=config.context_length, return_tensors="pt").input_ids
    with torch.no_grad():
        words = torch.nn.functional.normalize(theirs.get_text_features(input_ids=ids).pooler_output, dim=-1)
    np.testing.assert_allclose(bundle.text_features(TEXTS), words, atol=1e-5)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    assert bundle.image_features(image).shape == (1, config.embed_dim)
