"""What stands in for a missing side: learned from the other, read by the fusion where a side lacks and nowhere else, kept in a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mm_core.bundle import load_bundle, write_bundle
from mm_core.models.family import build_model
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import Task
from mm_core.models.hallucination import HALLUCINATION, Hallucination
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.objectives.multitask import MultitaskConfig, MultitaskObjective
from tests.mm_core.models.test_flava import COUNT, SMALL, TOKENS, pairs

OBJECTIVE = MultitaskConfig(modality_dropout=0.3, hallucination=0.5)


def model_of(*, hallucinates: bool = True) -> Fused:
    torch.manual_seed(0)
    inner = build_model(SMALL, TOKENS)
    return Fused(inner, hallucination=Hallucination(inner.config) if hallucinates else None).double()


def test_where_both_sides_are_there_nothing_stands_in() -> None:
    """Matching and masked places of whole pairs are predicted as without the head."""
    batch = pairs(SMALL)
    with torch.no_grad():
        with_head, without = (model_of(hallucinates=one)(batch) for one in (True, False))
    for task, found in without.predictions.items():
        torch.testing.assert_close(with_head.predictions[task].logits, found.logits)


def test_what_stands_in_is_of_the_side_that_is_there() -> None:
    """Another image behind a missing one changes nothing; a pair of which one side is hidden is that side alone; the head is read."""
    model, batch = model_of(), pairs(SMALL)
    images, texts = batch.images, batch.texts
    blind = replace(batch, texts=replace(texts, masked_ids=texts.input_ids), seen=torch.tensor([[False, True]] * COUNT))
    with torch.no_grad():
        shown = [model(replace(blind, images=replace(images, pixels=pixels))) for pixels in (images.pixels, images.pixels.flip(0))]
        first, second = (output.predictions[Task.MMM_TEXT].logits for output in shown)
        torch.testing.assert_close(first, second)
        states = model.fused_states(None, texts.input_ids)
        places = 1 + texts.rows % SMALL.context_length
        alone = model.model.mmm_text_head(states[texts.rows // SMALL.context_length, places])
        torch.testing.assert_close(first, alone)
        before = model.multimodal_features(None, texts.input_ids), model.multimodal_features(images.pixels, None)
        assert model.hallucination is not None
        for layer in (model.hallucination.image_token, model.hallucination.text_token):
            layer.bias.normal_()
        after = model.multimodal_features(None, texts.input_ids), model.multimodal_features(images.pixels, None)
        assert all(not torch.allclose(one, other) for one, other in zip(before, after, strict=True))


def test_it_learns_and_does_not_pull_at_the_towers() -> None:
    model, batch = model_of(), pairs(SMALL)
    objective = MultitaskObjective(OBJECTIVE)
    found = objective(model(batch), batch, [COUNT])
    cosine = float(found.measures["hallucination/cosine"])
    assert float(found.terms["hallucination"].detach()) == pytest.approx(0.5 * (1 - cosine))
    found.terms["hallucination"].backward()
    pulled = {name for name, p in model.named_parameters() if p.grad is not None}
    assert pulled
    assert all(name.startswith(("hallucination.text_of", "hallucination.image_of")) for name in pulled)
    optimizer = torch.optim.Adam(model.hallucination.parameters(), lr=1e-2)  # type: ignore[union-attr]
    for _ in range(60):
        optimizer.zero_grad()
        found = objective(model(batch), batch, [COUNT])
        found.terms["hallucination"].backward()
        optimizer.step()
    assert float(found.measures["hallucination/cosine"]) > 0.95 > cosine


def test_what_stands_in_pulls_at_no_tower() -> None:
    """A masked patch beside a missing text is predicted from the image's tokens and from a guess made of its class token, which stays."""
    model, batch = model_of(), pairs(SMALL)
    blind = replace(batch, seen=torch.tensor([[True, False]] * COUNT), texts=replace(batch.texts, rows=batch.texts.rows[:0]))
    found = MultitaskObjective(OBJECTIVE)(model(blind), blind, [COUNT])
    found.terms["mmm_image"].backward()
    assert model.hallucination is not None
    assert model.hallucination.text_token.weight.grad is not None
    assert model.model.flava.image_model.layernorm.weight.grad is None
    assert model.model.flava.text_model.layernorm.weight.grad is None


def test_a_bundle_keeps_it(tmp_path: Path) -> None:
    tokenizer = train_bpe(["a red circle", "a blue square"] * 3, vocab_size=300, context_length=10)
    config = SMALL.model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    inner = build_model(config, special_tokens(tokenizer))
    model = Fused(inner, hallucination=Hallucination(inner.config)).eval()
    facts = {"recipe": "flava-tiny", "data_fingerprint": "f", "metrics": {}}
    manifest = write_bundle(tmp_path / "b", model=inner, beside=model.beside, tokenizer=tokenizer, config=config, **facts)  # type: ignore[arg-type]
    assert HALLUCINATION in manifest.files
    bundle = load_bundle(tmp_path / "b")
    texts = ["a red circle", "a blue square"]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        ids = torch.from_numpy(bundle.tokenise(texts)).long()
        of_texts = model.multimodal_features(None, ids).numpy()
        of_images = model.multimodal_features(torch.from_numpy(images), None).numpy()
    np.testing.assert_allclose(bundle.multimodal_features(None, texts), of_texts, atol=1e-5)
    np.testing.assert_allclose(bundle.multimodal_features(images, None), of_images, atol=1e-5)


def test_without_modality_dropout_it_is_refused() -> None:
    with pytest.raises(ValidationError, match="mmm_image=0 and mmm_text=0 leave out"):
        MultitaskConfig.model_validate({"modality_dropout": 0.3, "weights": {"mmm_image": 0, "mmm_text": 0}})
    with pytest.raises(ValidationError, match="modality_dropout=0 leaves none out"):
        MultitaskConfig(hallucination=1.0)
