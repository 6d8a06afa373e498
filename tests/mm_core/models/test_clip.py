from __future__ import annotations

import pytest
import torch

from mm_core.errors import ConfigError
from mm_core.models import clip
from mm_core.models.clip import build_clip
from mm_core.models.family import outline, parameter_count
from mm_core.models.sizes import SpecialTokens
from mm_core.models.tokenizer import caption_tokenizer, special_tokens, train_bpe
from mm_core.models.two_tower import ImageTextBatch, TwoTower


@pytest.mark.parametrize(
    ("config", "published"),
    [(clip.clip_vit_b32(), 151_277_313), (clip.clip_vit_b16(), 149_620_737), (clip.clip_vit_l14(), 427_616_513)],
    ids=["B/32", "B/16", "L/14"],
)
def test_sizes_are_the_published_ones(config: clip.ClipConfig, published: int) -> None:
    assert parameter_count(config) == published


@pytest.mark.parametrize(
    ("config", "published"),
    [(clip.clip_vit_s32(), 63.09), (clip.clip_vit_s16(), 62.26), (clip.clip_vit_h14(), 986.11), (clip.clip_vit_bigg14(), 2539.57)],
    ids=["S/32", "S/16", "H/14", "bigG/14"],
)
def test_sizes_are_open_clips(config: clip.ClipConfig, published: float) -> None:
    """Millions of parameters, of open_clip's docs/model_profile.csv."""
    assert round(parameter_count(config) / 1e6, 2) == published


def test_ti_has_the_published_towers() -> None:
    """CLIP-KD counts 5.6 M of images and 21.3 M in the text tower's blocks."""
    model = outline(clip.clip_vit_ti16())
    vision = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    assert round(sum(p.numel() for p in vision) / 1e6, 1) == 5.6
    assert round(sum(p.numel() for p in model.text_model.encoder.parameters()) / 1e6, 1) == 21.3


def test_text_is_pooled_at_its_end_mark() -> None:
    """What stands behind the end mark must not change the features, and what stands before it must."""
    tokenizer = train_bpe(["a red circle", "a blue square"], vocab_size=300, context_length=16)
    tokens = special_tokens(tokenizer)
    assert tokens.eos != 2
    config = clip.clip_tiny().model_copy(update={"context_length": 16, "vocab_size": len(tokenizer)})
    model = TwoTower(build_clip(config, tokens)).eval()
    ids = torch.from_numpy(caption_tokenizer(tokenizer, 16)(["a red circle"])).long()
    end = int((ids[0] == tokens.eos).nonzero()[0])
    behind, before = ids.clone(), ids.clone()
    behind[0, end + 1 :] = 7
    before[0, end - 1] = 7
    with torch.no_grad():
        features = model.text_features(ids)
        torch.testing.assert_close(model.text_features(behind), features)
        assert (model.text_features(before) - features).abs().max() > 1e-3


def test_the_pooled_vector_is_the_one_at_the_first_end_mark() -> None:
    tokenizer = train_bpe(["a red circle", "a blue square"], vocab_size=300, context_length=12)
    tokens = special_tokens(tokenizer)
    config = clip.clip_tiny().model_copy(update={"context_length": 12, "vocab_size": len(tokenizer)})
    text_model = build_clip(config, tokens).text_model.eval()
    ids = torch.from_numpy(caption_tokenizer(tokenizer, 12)(["a", "a red circle", "a blue square " * 9])).long()
    ids[0, 8] = tokens.eos  # a second one, in the padding
    first_end = (ids == tokens.eos).int().argmax(dim=1)
    with torch.no_grad():
        output = text_model(input_ids=ids)
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[torch.arange(3), first_end])
    assert int(first_end[2]) == 11


def test_features_are_unit_vectors_whatever_the_attention() -> None:
    torch.manual_seed(0)
    config = clip.clip_tiny()
    model = TwoTower(build_clip(config, SpecialTokens(bos=3, eos=4, pad=0))).eval()
    ids = torch.randint(5, 100, (3, 2, config.context_length))
    ids[..., 9] = 4
    batch = ImageTextBatch(torch.randint(0, 256, (3, 1, 64, 64, 3), dtype=torch.uint8), ids)
    with torch.no_grad():
        sdpa = model(batch)
        model.model.set_attn_implementation("eager")
        eager = model(batch)
    torch.testing.assert_close(sdpa.image_features.norm(dim=2), torch.ones(3, 1))
    torch.testing.assert_close(sdpa.image_features, eager.image_features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sdpa.text_features, eager.text_features, atol=1e-5, rtol=1e-4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="pools at the wrong token"):
        build_clip(clip.clip_tiny(), SpecialTokens(bos=1, eos=2, pad=0))
    with pytest.raises(ConfigError, match=r"vocab_size 1024 does not hold .*eos=1024"):
        build_clip(clip.clip_tiny(), SpecialTokens(bos=3, eos=1024, pad=0))
    with pytest.raises(ConfigError, match="image_size 65 is no multiple of patch_size 16"):
        build_clip(clip.clip_tiny().model_copy(update={"image_size": 65}), SpecialTokens(bos=3, eos=4, pad=0))
    with pytest.raises(ConfigError, match=r"model\.text\.width 10 is no multiple"):
        build_clip(
            clip.clip_tiny().model_copy(update={"text": clip.TowerConfig(width=10, layers=1, heads=3)}), SpecialTokens(bos=3, eos=4, pad=0)
        )
