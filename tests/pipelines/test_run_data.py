"""The tokenizer is trained on what training will read, and on nothing that a ledger drops or masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mm_core.data.index import Index
from mm_core.data.ledger import Source, write_ledger
from mm_core.data.personal import PersonalKind
from pipelines.index import build_index
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
