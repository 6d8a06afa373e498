"""Pairs or one side of them are classified: what is trained for it, the loss on any number of ranks, and what a bundle keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import FlavaForPreTraining

from mm_core.bundle import load_bundle, look_into, write_bundle
from mm_core.errors import BundleError
from mm_core.models.family import build_model
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import ClassOutput, LabelledBatch, Sides
from mm_core.models.fused_classifier import CLASSIFIER, ClassHead, FusedClassifier
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.objectives.classify import ClassifyConfig, ClassifyObjective
from tests.mm_core.models.test_flava import COUNT, SMALL, TOKENS, images_and_texts

CLASSES = 3


def model_of(sides: Sides = Sides.BOTH) -> FusedClassifier:
    torch.manual_seed(0)
    inner = build_model(SMALL, TOKENS)
    return FusedClassifier(inner, ClassHead(inner.config, CLASSES, sides))


def batch_of(sides: Sides = Sides.BOTH) -> LabelledBatch:
    images, texts = images_and_texts()
    return LabelledBatch(
        images.pixels if "image" in sides.modalities else None,
        texts.input_ids if "text" in sides.modalities else None,
        torch.arange(COUNT) % CLASSES,
    )


@pytest.mark.parametrize("sides", list(Sides))
def test_what_is_trained_is_what_is_read(sides: Sides) -> None:
    """Ranks wait for the gradient of all that is trained, so nothing else may be."""
    model, batch = model_of(sides), batch_of(sides)
    ClassifyObjective(ClassifyConfig(num_classes=CLASSES))(model(batch), batch, [COUNT]).total.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pulled = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == pulled
    towers = {side for side in ("image", "text") if any(f".{side}_model." in name for name in pulled)}
    assert towers == sides.modalities


def test_it_learns_classes() -> None:
    model, batch = model_of(), batch_of()
    objective = ClassifyObjective(ClassifyConfig(num_classes=CLASSES))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        found = objective(model(batch), batch, [COUNT])
        found.total.backward()
        optimizer.step()
    assert float(found.measures["accuracy/classify"]) == 1
    assert float(found.terms["classify"].detach()) < 0.1


def test_the_shares_of_uneven_ranks_are_the_whole_batchs() -> None:
    logits, labels = torch.randn(COUNT, CLASSES), torch.arange(COUNT) % CLASSES
    objective = ClassifyObjective(ClassifyConfig(num_classes=CLASSES, label_smoothing=0.1))
    counts = [4, 2]
    parts = [
        objective(ClassOutput(rows), LabelledBatch(None, None, truth), counts)
        for rows, truth in zip(logits.split(counts), labels.split(counts), strict=True)
    ]
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(sum(part.terms["classify"] for part in parts), expected)
    torch.testing.assert_close(sum(part.total for part in parts) / len(counts), expected)
    hits = (logits.argmax(dim=1) == labels).float().mean()
    torch.testing.assert_close(sum(part.measures["accuracy/classify"] for part in parts), hits)


def test_a_bundle_keeps_the_head_and_transformers_reads_the_rest(tmp_path: Path) -> None:
    tokenizer = train_bpe(["a red circle", "a blue square"] * 3, vocab_size=300, context_length=10)
    config = SMALL.model_copy(update={"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    inner = build_model(config, special_tokens(tokenizer))
    model = FusedClassifier(inner, ClassHead(inner.config, CLASSES, Sides.BOTH)).eval()
    facts = {"tokenizer": tokenizer, "config": config, "recipe": "flava-tiny-classify", "data_fingerprint": "f", "metrics": {}}
    manifest = write_bundle(tmp_path / "b", model=inner, beside=model.beside, **facts)  # type: ignore[arg-type]
    assert CLASSIFIER in manifest.files
    bundle, texts = load_bundle(tmp_path / "b"), ["a red circle", "a blue square"]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        pixels, ids = torch.from_numpy(images), torch.from_numpy(bundle.tokenise(texts)).long()
        expected = [model.class_logits(*shown).softmax(dim=1).numpy() for shown in ((pixels, ids), (pixels, None), (None, ids))]
    found = [bundle.classify(images, texts), bundle.classify(images, None), bundle.classify(None, texts)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert (bundle.class_head.num_classes, bundle.class_head.sides) == (CLASSES, Sides.BOTH)
    assert "to classify by 3 classes, of images with texts" in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(BundleError, match="b was fine-tuned to classify, and answers nothing else"):
        bundle.match(images, texts)
    assert look_into(tmp_path / "b") == "classify"
    FlavaForPreTraining.from_pretrained(tmp_path / "b")

    write_bundle(tmp_path / "plain", model=inner, beside=Fused(inner).beside, **facts)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"has no classes: fine-tune a flava model with `mm train flava-tiny-classify --init`"):
        load_bundle(tmp_path / "plain").classify(images, texts)

    blind = FusedClassifier(inner, ClassHead(inner.config, CLASSES, Sides.TEXT))
    write_bundle(tmp_path / "blind", model=inner, beside=blind.beside, **facts)  # type: ignore[arg-type]
    bundle = load_bundle(tmp_path / "blind")
    assert bundle.classify(None, texts).shape == (2, CLASSES)
    with pytest.raises(BundleError, match="blind classifies by its text alone: give no images"):
        bundle.classify(images, texts)
