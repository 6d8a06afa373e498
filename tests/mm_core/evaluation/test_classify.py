"""Accuracy by what is shown: of a model of both sides three, of a model of texts its own, without a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mm_core.bundle import Bundle, load_bundle, write_bundle
from mm_core.data.ledger import compile_kept
from mm_core.data.reader import IndexReader
from mm_core.data.synth.corpus import SynthConfig, write_corpus
from mm_core.errors import BundleError
from mm_core.evaluation.classify import class_metrics
from mm_core.evaluation.tasks import held_out
from mm_core.models.family import build_model
from mm_core.models.flava import flava_tiny
from mm_core.models.fused_batch import Sides
from mm_core.models.fused_classifier import ClassHead, FusedClassifier
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")
TOWER = TowerConfig(width=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classify") / "corpus"
    write_corpus(folder, SynthConfig(samples=0, heldout_samples=150, zeroshot_samples=0, matching_samples=1, image_size=32))
    return folder / "matching" / "heldout"


def bundle_of(sides: Sides, folder: Path) -> Bundle:
    tokenizer = train_bpe(["a red circle above a blue square"] * 5, vocab_size=320, context_length=24)
    sizes = {"vocab_size": len(tokenizer), "vision": TOWER, "text": TOWER, "fusion": TOWER, "context_length": 24}
    config = flava_tiny().model_copy(update=sizes)
    torch.manual_seed(0)
    model = build_model(config, special_tokens(tokenizer))
    beside = FusedClassifier(model, ClassHead(model.config, 2, sides)).beside
    facts = {"tokenizer": tokenizer, "config": config, "recipe": "flava-tiny-classify", "data_fingerprint": "f", "metrics": {}}
    write_bundle(folder, model=model, beside=beside, **facts)  # type: ignore[arg-type]
    return load_bundle(folder)


def test_it_is_measured_by_what_it_is_trained_on(shards: Path, tmp_path: Path) -> None:
    index = build_index([str(shards)], str(tmp_path / "index"))
    reader, ordinals = IndexReader(index), compile_kept(index).ordinals
    bundle = bundle_of(Sides.BOTH, tmp_path / "both")
    found = class_metrics(bundle, reader, ordinals)
    assert found.keys() == {"image", "text", "both"}
    samples = reader.read(ordinals)
    truth, texts = np.array([sample.label for sample in samples]), [sample.captions[0] for sample in samples]  # type: ignore[union-attr]
    assert found["text"]["accuracy"] == (bundle.classify(None, texts).argmax(axis=1) == truth).mean()
    assert found["text"]["constant_accuracy"] == max(truth.mean(), 1 - truth.mean())
    with pytest.raises(BundleError, match="was fine-tuned to classify, and answers nothing else"):
        held_out(bundle, reader, ordinals)


def test_texts_need_no_pictures(shards: Path, tmp_path: Path) -> None:
    index = build_index([str(shards)], str(tmp_path / "index"), need=("text",))
    found = class_metrics(bundle_of(Sides.TEXT, tmp_path / "text"), IndexReader(index), compile_kept(index).ordinals)
    assert found.keys() == {"text"}
    assert 0 <= found["text"]["accuracy"] <= 1
