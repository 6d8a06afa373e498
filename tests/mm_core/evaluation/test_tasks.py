"""Figures of each task: those of the model's own forward, beside the best constant answer; what they are asked of."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mm_core.bundle import load_bundle, write_bundle
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.data.reader import IndexReader
from mm_core.errors import BundleError
from mm_core.evaluation.probe import fused_features, linear_probe
from mm_core.evaluation.tasks import _Score, held_out, hiding, task_metrics
from mm_core.models.clip import clip_tiny
from mm_core.models.family import build_model
from mm_core.models.flava import flava_tiny
from mm_core.models.fused import Fused
from mm_core.models.fused_batch import Predictions, Sides
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import caption_tokenizer, special_tokens, train_bpe

TOWER = TowerConfig(width=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Index:
    from pipelines.index import build_index

    return build_index([str(corpus / "heldout")], str(tmp_path_factory.mktemp("tasks") / "index"))


def bundle_of(kind: str, folder: Path) -> Path:
    tokenizer = train_bpe(["a red circle above a blue square"] * 5, vocab_size=320, context_length=24)
    config = {"flava": flava_tiny(), "clip": clip_tiny()}[kind].model_copy(
        update={"vocab_size": len(tokenizer), "vision": TOWER, "text": TOWER}
    )
    config = config.model_copy(update={"fusion": TOWER, "context_length": 24} if kind == "flava" else {"context_length": 24})
    torch.manual_seed(0)
    model = build_model(config, special_tokens(tokenizer))  # type: ignore[arg-type]
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe=kind, data_fingerprint="f", metrics={})
    return folder


def test_a_score_is_beside_the_best_constant_answer() -> None:
    score = _Score()
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    score.add(Predictions(logits, torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False])))
    score.add(Predictions(logits[:1], torch.tensor([0])))
    found = score.metrics()
    assert (found["places"], found["accuracy"], found["constant_accuracy"]) == (4, 1, 0.75)
    assert found["constant_loss"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found["loss"] == pytest.approx(math.log(1 + math.exp(-3)))


def test_every_task_is_measured_the_same_each_time(index: Index, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_of("flava", tmp_path / "b"))
    assert isinstance(bundle.towers, Fused)
    held = held_out(bundle, IndexReader(index), compile_kept(index).ordinals)
    found = task_metrics(bundle.towers, held, torch.device("cpu"))
    assert found.keys() == {
        "mim",
        "mlm",
        "mmm_image",
        "mmm_text",
        "mmm_text_other_image",
        "mmm_text_no_image",
        "itm",
        "itm_uniform",
        "contrastive",
    }
    assert found == task_metrics(bundle.towers, held, torch.device("cpu"))
    assert found["itm"]["constant_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert found["mmm_text"]["places"] == found["mlm"]["places"]
    assert found["contrastive"]["constant_loss"] == pytest.approx(math.log(64), abs=0.1)
    assert found["contrastive"]["places"] == 2 * len(held.ordinals)
    colours = hiding({"red", "blue"}, held.tokenizer, held.masking.mask_id)
    named = task_metrics(bundle.towers, held, torch.device("cpu"), hide=colours, whole_images=True)
    assert not named.keys() & {"mim", "mmm_image"}
    assert 0 < named["mmm_text"]["places"] < found["mmm_text"]["places"] * 5


def test_named_words_are_hidden_with_all_their_tokens() -> None:
    tokenizer = caption_tokenizer(train_bpe(["a circle"] * 3, vocab_size=300, context_length=40), 40)
    texts = ["A Turquoise circle, turquoise.", "a circle"]
    ids, words = tokenizer.with_words(texts)
    masked, hidden = hiding({"turquoise"}, tokenizer, 1)(ids, words, texts, np.zeros(2, dtype=np.uint64))
    assert tokenizer.words(texts[0]) == ["a", "turquoise", "circle", ",", "turquoise", "."]
    assert any(np.array_equal(hidden[0], words[0] == place) for place in (1, 4))  # one of the two
    assert not hidden[1].any()
    assert (masked[hidden] == 1).all()


def test_two_towers_have_no_such_tasks(index: Index, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="needs a flava model"):
        held_out(load_bundle(bundle_of("clip", tmp_path / "c")), IndexReader(index), compile_kept(index).ordinals)


def test_what_the_fusion_gives_of_one_side_or_both(tmp_path: Path) -> None:
    bundle = load_bundle(bundle_of("flava", tmp_path / "b"))
    images = np.random.default_rng(0).integers(0, 256, (130, 64, 64, 3), dtype=np.uint8)
    texts = ["a red circle", "a blue square"] * 65
    found = {sides: fused_features(bundle, images, texts, sides) for sides in Sides}
    assert {features.shape for features in found.values()} == {(130, 16)}
    np.testing.assert_allclose(found[Sides.TEXT][128], bundle.multimodal_features(None, texts[:1])[0], atol=1e-5)
    np.testing.assert_allclose(found[Sides.IMAGE][129], bundle.multimodal_features(images[129:], None)[0], atol=1e-5)
    np.testing.assert_allclose(found[Sides.BOTH][129], bundle.multimodal_features(images[129:], texts[129:])[0], atol=1e-5)


def test_a_probe_reads_what_is_linear() -> None:
    draw = np.random.default_rng(0)
    features, held = draw.normal(size=(400, 6)), draw.normal(size=(200, 6))
    found = linear_probe(features, [str(v > 0) for v in features[:, 2]], held, [str(v > 0) for v in held[:, 2]])
    assert found["accuracy"] > 0.93
    assert found["constant_accuracy"] == pytest.approx(0.5, abs=0.1)
