"""What a run may ask of its model, known before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from mm_core.config import resolve
from mm_core.errors import ConfigError
from mm_core.models.codebook import CodebookSizes, codebook_settings
from mm_core.models.fused_batch import PairBatch
from mm_core.training.transfer import Transfer
from pipelines.batches import StepBatch, StepMasks
from pipelines.recipes import recipe
from pipelines.train.config import TrainRun
from pipelines.train.cost import cost_of
from pipelines.train.parts import check_parts, contrasts, inputs_of, modalities_of, needs_of, num_classes, serves
from pipelines.train.scale import describe_scale


def run_of(name: str, *settings: str) -> TrainRun:
    return resolve(recipe(name), environment={}, overrides=settings)[0]


def test_pieces_are_refused_where_features_depend_on_the_whole_batch() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.micro_batch_size .*BatchNorm.*parallel\.activation_checkpointing=true"):
        check_parts(run_of("align-tiny", "parallel.micro_batch_size=8"))
    check_parts(run_of("align-tiny", "parallel.micro_batch_size=8", "towers.frozen=vision"))
    check_parts(run_of("clip-tiny", "parallel.micro_batch_size=8"))


def test_patches_are_dropped_where_there_are_some_and_they_are_trained() -> None:
    check_parts(run_of("siglip-tiny", "towers.patch_dropout=0.5"))
    with pytest.raises(ConfigError, match=r"set towers\.patch_dropout=0"):
        check_parts(run_of("align-tiny", "towers.patch_dropout=0.5"))
    with pytest.raises(ConfigError, match="set one of the two"):
        run_of("clip-tiny", "towers.patch_dropout=0.5", "towers.frozen=vision")


def test_what_is_for_two_towers_is_refused_elsewhere() -> None:
    check_parts(run_of("flava-tiny"))
    check_parts(run_of("codebook-tiny"))
    with pytest.raises(ConfigError, match=r"micro_batch_size .* flava model: .*activation_checkpointing"):
        check_parts(run_of("flava-tiny", "parallel.micro_batch_size=8"))
    with pytest.raises(ConfigError, match=r"towers\.frozen"):
        check_parts(run_of("codebook-tiny", "towers.frozen=vision"))
    with pytest.raises(ConfigError, match=r"one view and one text"):
        check_parts(run_of("flava-tiny", "data.captions=2"))
    with pytest.raises(ConfigError, match="there is no task"):
        run_of("flava-tiny", "objective.weights={mim: 0, mlm: 0, mmm_image: 0, mmm_text: 0, itm: 0, contrastive: 0}")


def test_an_objective_belongs_to_its_model() -> None:
    with pytest.raises(ConfigError, match=r"objective\.kind=contrastive is none of a flava model"):
        check_parts(run_of("flava-tiny", "objective={kind: contrastive}"))
    with pytest.raises(ConfigError, match=r"objective\.kind=codebook is none of a clip model"):
        check_parts(run_of("clip-tiny", "objective={kind: codebook}"))


def test_fine_tuning_shows_whole_samples_and_compares_no_features() -> None:
    run = run_of("flava-tiny-classify", "objective.sides=text")
    check_parts(run)
    assert (modalities_of(run), needs_of(run), num_classes(run), contrasts(run)) == ({"text"}, {"text"}, 2, False)
    for settings, said in {
        "data.masking={}": r"hides what objective\.kind=multitask predicts",
        "data.captions=2": "one view and one text",
        "evaluation={every_steps: 1, retrieval: x}": r"mm eval --classify",
    }.items():
        with pytest.raises(ConfigError, match=said):
            check_parts(run_of("flava-tiny-classify", settings))
    with pytest.raises(ConfigError, match=r"objective\.kind=classify is none of a clip model"):
        check_parts(run_of("clip-tiny", "objective={kind: classify}"))
    with pytest.raises(ConfigError, match=r"data\.masking hides what objective\.kind=multitask predicts, and this is contrastive"):
        check_parts(run_of("clip-tiny", "data.masking={}"))


def test_modality_dropout_hides_one_side_of_a_share_and_predicts_nothing_of_it() -> None:
    run, count = run_of("flava-tiny", "objective.modality_dropout=0.4"), 2000
    positions = np.arange(count, dtype=np.uint64)

    def batch(rows: slice) -> PairBatch:
        here = positions[rows]
        images, ids = np.zeros((len(here), 1, 8, 8, 3), dtype=np.uint8), np.ones((len(here), 1, 4), dtype=np.int32)
        masks = StepMasks(np.ones((len(here), 16), dtype=bool), ids[:, 0], np.ones((len(here), 4), dtype=bool))
        step = StepBatch(0, images, ids, here, pa.table({}), masks)
        found = inputs_of(run, [len(here)], 0)(step, Transfer(torch.device("cpu")))
        assert isinstance(found, PairBatch)
        return found

    whole = batch(slice(None))
    assert whole.seen is not None
    seen = whole.seen.numpy()
    assert seen.any(axis=1).all()
    assert (~seen).mean(axis=0) == pytest.approx([0.2, 0.2], abs=0.03)
    np.testing.assert_array_equal(np.unique(whole.images.rows.numpy() // 16), np.flatnonzero(seen[:, 0]))
    np.testing.assert_array_equal(np.unique(whole.texts.rows.numpy() // 4), np.flatnonzero(seen[:, 1]))
    parts = [batch(slice(0, 1200)).seen, batch(slice(1200, None)).seen]
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in parts if part is not None]), seen)


def test_what_is_counted_is_what_is_shown(tmp_path: Path) -> None:
    """Of one side no more than its tower and a shorter fusion; of neither a similarity."""
    costs = {sides: cost_of(run_of("flava-tiny-classify", f"objective.sides={sides}")) for sides in ("image", "text", "both")}
    alone = costs["image"].trained_parameters, costs["text"].trained_parameters
    assert max(alone) < costs["both"].trained_parameters < sum(alone)
    assert max(costs[side].forward_flops for side in ("image", "text")) < costs["both"].forward_flops
    sizes = codebook_settings(CodebookSizes(width=8, blocks_per_group=1, entries=12))
    FlavaImageCodebook(FlavaImageCodebookConfig(**sizes)).save_pretrained(tmp_path / "book")
    found = describe_scale(run_of("flava-tiny-classify", f"model.codebook_source={tmp_path / 'book'}"), 2, "h100")
    assert not {"tflop_similarities", "memory_gb_similarities"} & found.keys()
    assert found["sent_mb_features"] == 0


def test_a_source_teaches_something() -> None:
    run = run_of("flava-tiny", "objective.weights.mlm=0")
    assert not serves(run, ("text",))
    assert serves(run, ("image",))
    assert serves(run, ("image", "text"))
    assert not serves(
        run_of("flava-tiny", *(f"objective.weights.{t}=0" for t in ("mmm_image", "mmm_text", "itm", "contrastive"))), ("image", "text")
    )


def test_a_jump_of_the_loss_is_not_looked_for_where_steps_differ() -> None:
    with pytest.raises(ConfigError, match=r"faults\.spike .*several tasks"):
        check_parts(run_of("flava-tiny", "faults.spike=skip"))
    check_parts(run_of("codebook-tiny", "faults.spike=skip"))


def test_flava_base_is_trained_as_the_paper_says() -> None:
    """Singh et al. 2022, section 3.4 and its appendix."""
    run = run_of("flava-base")
    assert (run.global_batch_size, run.steps, run.schedule.warmup_steps) == (8_192, 150_000, 10_000)
    optimizer = run.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay) == (1e-3, 0.9, 0.999, 1e-8, 0.1)
    assert run.data.masking is not None
    assert (run.data.masking.image_share, run.data.masking.min_block, run.data.masking.text_share) == (0.4, 16, 0.15)
    assert run.tokenizer.source == "google-bert/bert-base-uncased"
