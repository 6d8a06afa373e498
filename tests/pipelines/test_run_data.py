"""The tokenizer is trained on what training will read, and on nothing that a ledger drops or masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm_core.config import resolve
from mm_core.data.index import Index
from mm_core.data.ledger import Source
from mm_core.data.personal import PersonalKind
from mm_core.data.split import write_ledger
from mm_core.errors import ConfigError, DataError
from pipelines.index import build_index
from pipelines.recipes import recipe
from pipelines.train.run_data import RunData


@pytest.fixture(scope="module")
def index(ray_cluster: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("run_data") / "index"))


def test_captions_are_those_of_kept_samples(index: Index) -> None:
    repeat = np.zeros(index.summary.rows, dtype=np.float32)
    repeat[[3, 120, 329]] = 1
    write_ledger(index, "three", rule="test", repeat=repeat, reason="dropped")
    captions = [caption for batch in index.samples(["captions"]) for caption in batch["captions"].to_pylist()]
    data = RunData.open([Source(index=index.url, ledgers=("three",))])
    assert list(data.captions(1000)) == [caption for row in (3, 120, 329) for caption in captions[row]]
    assert len(list(data.captions(2))) == 2


def test_captions_are_masked_as_training_reads_them(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    data = RunData.open([Source(index=index.url)])
    masked = replace(data, kept=(replace(data.kept[0], mask=(PersonalKind.EMAIL,)),))
    monkeypatch.setattr("pipelines.train.run_data.mask_personal", lambda text, kinds: f"{text} {[*kinds]}")
    assert all(caption.endswith("EMAIL: 'email'>]") for caption in masked.captions(5))


def test_indexes_of_other_modalities_are_read_a_step_at_a_time(index: Index, corpus: Path, tmp_path: Path) -> None:
    pictures = build_index([str(corpus / "train")], str(tmp_path / "pictures"), need=("image",))
    data = RunData.open([Source(index=index.url), Source(index=pictures.url)])
    with pytest.raises(ConfigError, match=r"a step must be of one of them: --set data\.mix\.choice=step"):
        data.plan(recipe("clip-tiny"))
    by_step = resolve(recipe("clip-tiny"), environment={}, overrides=["data.mix.choice=step"])[0]
    assert data.plan(by_step).chunk == by_step.data.chunk


def test_every_sample_has_a_class_that_the_model_tells(index: Index, corpus: Path, tmp_path: Path) -> None:
    run = recipe("flava-tiny-classify")
    with pytest.raises(DataError, match=r"330 samples of .* have no class: each needs a \.cls member"):
        RunData.open([Source(index=index.url)]).check_labels(run)
    RunData.open([Source(index=index.url)]).check_labels(recipe("flava-tiny"))
    labelled = build_index([str(corpus / "zeroshot" / "test")], str(tmp_path / "labelled"), need=("image",))
    data, by_image = RunData.open([Source(index=labelled.url)]), ["objective.sides=image", "objective.num_classes=48"]
    with pytest.raises(DataError, match=r"has samples of class 47, and objective\.num_classes=2 are told apart, 0 to 1"):
        data.check_labels(run)
    with pytest.raises(ConfigError, match="made for image alone, but this recipe pairs images with texts"):
        data.check_modalities(run)
    run = resolve(run, environment={}, overrides=by_image)[0]
    data.check_labels(run)
    data.check_modalities(run)


def test_a_run_goes_on_with_a_higher_bound_for_bad_samples() -> None:
    lenient = resolve(recipe("clip-tiny"), environment={}, overrides=["data.max_bad_fraction=0.5"])[0]
    assert lenient.identity() == recipe("clip-tiny").identity()
