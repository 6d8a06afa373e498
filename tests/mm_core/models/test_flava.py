"""FLAVA's sizes, its parts against transformers' own forward, and an export that loads with both of transformers' classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import FlavaConfig as HFFlavaConfig
from transformers import FlavaForPreTraining, FlavaImageCodebook, FlavaModel

from mm_core.bundle import MANIFEST, load_bundle, look_into, write_bundle
from mm_core.distributed import GlobalBatch
from mm_core.errors import ConfigError
from mm_core.models.codebook import CodebookSizes, codebook_pixels, codebook_settings, codebook_sizes, load_codebook
from mm_core.models.family import build_model, outline, resolved
from mm_core.models.flava import FlavaConfig, flava_base, flava_tiny
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import ImageBatch, MaskedImages, MaskedTexts, PairBatch, Task, TextBatch
from mm_core.models.sizes import SpecialTokens, TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.models.two_tower import normalise
from mm_core.objectives.multitask import MultitaskConfig, MultitaskObjective

TOKENS = SpecialTokens(bos=3, eos=4, pad=0)
TOWER = TowerConfig(width=24, layers=2, heads=2)
SMALL = FlavaConfig(
    image_size=32,
    patch_size=8,
    context_length=10,
    text_positions=12,
    vocab_size=40,
    embed_dim=16,
    vision=TOWER,
    text=TOWER,
    fusion=TOWER,
    codebook=CodebookSizes(width=4, blocks_per_group=1, entries=12),
)
COUNT = 6


def model_of(config: FlavaConfig = SMALL) -> Fused:
    torch.manual_seed(0)
    return Fused(build_model(config, TOKENS)).double()


def images_and_texts(config: FlavaConfig = SMALL, count: int = COUNT) -> tuple[MaskedImages, MaskedTexts]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, config.image_size, config.image_size, 3), dtype=torch.uint8, generator=generator)
    mask = torch.rand(count, config.patches, generator=generator) < 0.4
    ids = torch.randint(5, config.vocab_size, (count, config.context_length), generator=generator)
    ids[::2, 7:] = TOKENS.pad
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & (ids != TOKENS.pad)
    masked = torch.where(chosen, 1, ids)
    return (
        MaskedImages(pixels, mask, mask.flatten().nonzero()[:, 0]),
        MaskedTexts(ids, masked, chosen.flatten().nonzero()[:, 0]),
    )


def pairs(config: FlavaConfig = SMALL, count: int = COUNT) -> PairBatch:
    draws = torch.rand(count, generator=torch.Generator().manual_seed(2))
    return PairBatch(*images_and_texts(config, count), draws, GlobalBatch((count,)))


def transformers_inputs(model: Fused, batch: PairBatch) -> dict[str, Any]:
    """The same for `FlavaForPreTraining` itself. Its labels are made anew each time, as it changes those it is given."""
    texts, images = batch.texts, batch.images
    labels = torch.full_like(texts.input_ids, -100)
    labels.view(-1)[texts.rows] = texts.input_ids.view(-1)[texts.rows]
    text = {
        "input_ids": texts.input_ids,
        "input_ids_masked": texts.masked_ids,
        "mlm_labels": labels,
        "attention_mask": (texts.input_ids != TOKENS.pad).long(),
    }
    image = {
        "pixel_values": normalise(images.pixels, model.mean, model.std),
        "codebook_pixel_values": codebook_pixels(images.pixels, SMALL.codebook_size).double(),
        "bool_masked_pos": images.mask,
    }
    return {"text": text, "image": image}


def test_the_base_has_the_papers_sizes() -> None:
    """Section 3.1: ViT-B/16, a text encoder of the same shape, six layers over both; transformers' defaults are facebook/flava-full's."""
    config = flava_base()
    assert (config.vision.width, config.vision.layers, config.vision.heads, config.patch_size, config.image_size) == (768, 12, 12, 16, 224)
    assert (config.text, config.fusion) == (config.vision, TowerConfig(width=768, layers=6, heads=12))
    with torch.device("meta"):
        published = {name: p.shape for name, p in FlavaForPreTraining(HFFlavaConfig()).named_parameters()}
    assert {name: p.shape for name, p in outline(config).named_parameters()} == published


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_its_parts_give_what_transformers_forward_gives(implementation: Any) -> None:
    """Losses of one rank, where each pair belongs together; and features, which transformers projects from the same states."""
    model, batch = model_of(), pairs()
    with torch.no_grad():
        inputs = transformers_inputs(model, batch)
        matched = torch.ones(COUNT, dtype=torch.long)
        expected = model.model(**inputs["text"], **inputs["image"], itm_labels=matched, return_loss=True)
        pixels, ids, attended = inputs["image"]["pixel_values"], inputs["text"]["input_ids"], inputs["text"]["attention_mask"]
        shown = model.model.flava(pixel_values=pixels, input_ids=ids, attention_mask=attended).multimodal_embeddings
        image_alone = model.model(**inputs["image"], return_loss=True).loss_info.mim
        text_alone = model.model(**inputs["text"], return_loss=True).loss_info.mlm
        itm = model.model.itm_head(shown)  # of whole sides; transformers' own is of masked ones
        model.attend(implementation)
        found = model(batch)
        losses = {task: torch.nn.functional.cross_entropy(p.logits, p.targets) for task, p in found.predictions.items()}
        mim = model(ImageBatch(batch.images, batch.whole)).predictions[Task.MIM]
        mlm = model(TextBatch(batch.texts, batch.whole)).predictions[Task.MLM]
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(losses[Task.MMM_IMAGE], expected.loss_info.mmm_image, **close)
    torch.testing.assert_close(losses[Task.MMM_TEXT], expected.loss_info.mmm_text, **close)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(mim.logits, mim.targets), image_alone, **close)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(mlm.logits, mlm.targets), text_alone, **close)
    torch.testing.assert_close(found.predictions[Task.ITM].logits[:COUNT], itm, **close)
    logits = found.logit_scale * found.image_features @ found.text_features.T
    torch.testing.assert_close(logits, expected.contrastive_logits_per_image, **close)


def test_each_term_is_its_loss_times_its_weight() -> None:
    """The contrastive one too: the mean of both directions over the batch."""
    model, batch = model_of(), pairs()
    weights = {"mmm_image": 0.5, "mmm_text": 2.0, "itm": 3.0, "contrastive": 4.0}
    objective = MultitaskObjective(MultitaskConfig.model_validate({"weights": weights}))
    with torch.no_grad():
        output = model(batch)
        found = objective(output, batch, [COUNT])
    cross_entropy = torch.nn.functional.cross_entropy
    expected = {
        task.value: cross_entropy(p.logits[p.counts], p.targets[p.counts]) if p.counts is not None else cross_entropy(p.logits, p.targets)
        for task, p in output.predictions.items()
    }
    logits, own = output.logit_scale * output.image_features @ output.text_features.T, torch.arange(COUNT)
    expected["contrastive"] = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    assert found.terms.keys() == weights.keys()
    for task, weight in weights.items():
        torch.testing.assert_close(found.terms[task], weight * expected[task], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.total, sum(found.terms.values()))


def test_hard_negatives_are_the_most_similar_other_texts() -> None:
    """With a sharp similarity the draw decides nothing; without hard ones the similarity decides nothing."""
    drawn = {}
    for hard in (1.0, 0.0):
        model, batch = Fused(build_model(SMALL, TOKENS), hard_negatives=hard).double(), pairs()
        model.load_state_dict(model_of().state_dict())
        with torch.no_grad():
            model.model.flava.logit_scale.fill_(12.0)
            features = model.image_features(batch.images.pixels), model.text_features(batch.texts.input_ids)
            drawn[hard] = model._negatives(batch, torch.zeros(COUNT, SMALL.context_length, 24).double(), features)[0].rows
            similar = features[0] @ features[1].T
    similar.fill_diagonal_(-2)
    assert drawn[1.0].tolist() == similar.argmax(dim=1).tolist()
    others = [[n for n in range(COUNT) if n != row] for row in range(COUNT)]
    assert drawn[0.0].tolist() == [texts[int(draw * (COUNT - 1))] for texts, draw in zip(others, batch.draws.tolist(), strict=True)]


def test_image_targets_are_the_same_in_any_precision() -> None:
    """Of entries that are near one another, as a codebook's are."""
    torch.manual_seed(0)
    model, (images, _) = Fused(build_model(SMALL, TOKENS)), images_and_texts(count=64)
    for name, parameter in model.model.image_codebook.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_normal_(parameter)
    images = replace(images, rows=torch.arange(images.mask.numel()))
    exact = model._entries(images)
    assert len(exact.unique()) > 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model._entries(images), exact)


def test_sdpa_and_checkpointing_change_no_gradient() -> None:
    gradients = []
    for implementation, checkpoints in (("eager", False), ("sdpa", False), ("sdpa", True)):
        model = model_of()
        model.attend(implementation)  # type: ignore[arg-type]
        if checkpoints:
            model.checkpoint_activations()
        output = model(pairs())
        total = sum(torch.nn.functional.cross_entropy(p.logits, p.targets) for p in output.predictions.values())
        (total + (output.image_features * output.text_features).sum() * output.logit_scale).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-9)


def test_every_trained_parameter_serves_a_task() -> None:
    """But mim_head and mlm_head, which a pair does not need: their steps are of one modality."""
    model, batch = model_of(), pairs()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = set()
    for one in (batch, ImageBatch(batch.images, batch.whole), TextBatch(batch.texts, batch.whole)):
        model.zero_grad()
        output = model(one)
        tensors = [p.logits.sum() for p in output.predictions.values()]
        tensors += [f.sum() * output.logit_scale for f in (output.image_features, output.text_features) if f is not None]
        torch.stack(tensors).sum().backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == trained


def test_an_export_loads_with_both_classes(tmp_path: Path) -> None:
    model = model_of().float()
    model.attend("sdpa")
    model.model.save_pretrained(tmp_path / "flava")
    whole = FlavaForPreTraining.from_pretrained(tmp_path / "flava")
    assert {n: t.shape for n, t in whole.state_dict().items()} == {n: t.shape for n, t in model.model.state_dict().items()}
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    bare = FlavaModel.from_pretrained(tmp_path / "flava").eval()
    batch = pairs()
    with torch.no_grad():
        features = bare.get_image_features(pixel_values=normalise(batch.images.pixels, model.mean, model.std)).pooler_output[:, 0]
        torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), model.image_features(batch.images.pixels))


def test_a_codebook_comes_from_a_folder(tmp_path: Path) -> None:
    sizes = CodebookSizes(width=8, blocks_per_group=2, entries=30)
    from transformers import FlavaImageCodebookConfig

    FlavaImageCodebook(FlavaImageCodebookConfig(**codebook_settings(sizes))).save_pretrained(tmp_path / "codebook")
    assert codebook_sizes(str(tmp_path / "codebook")) == sizes
    config = flava_tiny().model_copy(update={"codebook_source": str(tmp_path / "codebook")})
    found = resolved(config)
    assert isinstance(found, FlavaConfig)
    assert found.codebook == sizes
    built = build_model(SMALL.model_copy(update={"codebook": sizes}), TOKENS)
    built.save_pretrained(tmp_path / "flava")
    ours = load_codebook(str(tmp_path / "flava")).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in built.image_codebook.state_dict().items())
    with pytest.raises(ConfigError, match="no codebook at"):
        resolved(config.model_copy(update={"codebook_source": str(tmp_path / "nothing")}))
    with pytest.raises(ConfigError, match=r"name one with model\.codebook_source"):
        resolved(flava_tiny())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="fusion"):
        build_model(SMALL.model_copy(update={"fusion": TowerConfig(width=25, layers=1, heads=2)}), TOKENS)
    with pytest.raises(ConfigError, match="one width"):
        build_model(SMALL.model_copy(update={"fusion": TowerConfig(width=48, layers=1, heads=2)}), TOKENS)
    with pytest.raises(ConfigError, match="text_positions"):
        build_model(SMALL.model_copy(update={"text_positions": 9}), TOKENS)
    with pytest.raises(ConfigError, match="padding"):
        build_model(SMALL, SpecialTokens(bos=3, eos=4, pad=4))


def test_a_side_that_is_not_seen_changes_nothing() -> None:
    """Without its image a sample's masked words are predicted as if any other image were there; without its text the patches are."""
    model, batch = model_of(), pairs()
    images, texts = batch.images, batch.texts
    unseen = replace(batch, seen=torch.tensor([[False, True]] * COUNT))
    other = replace(unseen, images=replace(images, pixels=images.pixels.flip(0)))
    with torch.no_grad():
        blind, still_blind = (model(one).predictions[Task.MMM_TEXT].logits for one in (unseen, other))
        torch.testing.assert_close(blind, still_blind)
        assert not torch.allclose(blind, model(batch).predictions[Task.MMM_TEXT].logits)
        alone = replace(batch, seen=torch.tensor([[True, False]] * COUNT))
        silent = replace(alone, texts=replace(texts, masked_ids=texts.masked_ids.flip(0)))
        mute, still_mute = (model(one).predictions[Task.MMM_IMAGE].logits for one in (alone, silent))
        torch.testing.assert_close(mute, still_mute)
        torch.testing.assert_close(*(model(one).predictions[Task.ITM].logits for one in (alone, batch)))  # matching has both


def test_one_modality_alone_is_an_input_of_the_fusion() -> None:
    model, batch = model_of(), pairs()
    images, ids = batch.images.pixels, batch.texts.input_ids
    with torch.no_grad():
        both, image, text = (model.multimodal_features(*one) for one in ((images, ids), (images, None), (None, ids)))
        assert both.shape == image.shape == text.shape == (COUNT, TOWER.width)
        torch.testing.assert_close(both.norm(dim=1), torch.ones(COUNT, dtype=torch.float64))
        assert not torch.allclose(both, image)
        match = model.match(images, ids)
        assert ((match > 0) & (match < 1)).all()
        inputs = {"pixel_values": normalise(images, model.mean, model.std), "input_ids": ids, "attention_mask": (ids != TOKENS.pad).long()}
        theirs = model.model.flava(**inputs).multimodal_embeddings[:, 0]
        torch.testing.assert_close(both, torch.nn.functional.normalize(theirs, dim=-1))


def test_a_bundle_answers_what_a_server_asks(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"context_length": 12})
    tokenizer = train_bpe(["a red circle", "a blue square"] * 3, vocab_size=300, context_length=12)
    config = config.model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    facts = {"recipe": "flava-tiny", "data_fingerprint": "f", "metrics": {}}
    manifest = write_bundle(
        tmp_path / "b", model=build_model(config, special_tokens(tokenizer)), tokenizer=tokenizer, config=config, **facts
    )
    assert manifest.task == "multitask"
    bundle = load_bundle(tmp_path / "b")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    texts = ["a red circle", "a blue square"]
    assert bundle.is_multimodal
    assert bundle.image_features(images).shape == bundle.text_features(texts).shape == (2, config.embed_dim)
    assert bundle.multimodal_features(images, texts).shape == bundle.multimodal_features(None, texts).shape == (2, TOWER.width)
    assert bundle.multimodal_features(images, None).shape == (2, TOWER.width)
    assert bundle.match(images, texts).shape == (2,)
    (tmp_path / "b" / MANIFEST).unlink()
    plain = load_bundle(tmp_path / "b")
    assert look_into(tmp_path / "b") == plain.task == bundle.task == "multitask"
    assert plain.fused_dim == bundle.fused_dim == TOWER.width
