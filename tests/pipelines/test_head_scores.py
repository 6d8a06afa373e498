"""Classifier heads over embeddings: the scores are torch's own, and what does not fit is refused before anything is written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mm
from mm_core.curation.ruleset import RuleSet
from mm_core.data.columns import vectors_column
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.data.scores import Scores, ScoresSummary
from mm_core.errors import ConfigError, DataError
from pipelines.curate.filter import filter_index
from pipelines.curate.head_scores import HeadScore, score_by_head
from pipelines.curate.score import score_images
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROWS, DIMENSION = 330, 16
ABSENT = 7
"""Every so manieth sample has no embedding."""


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(ROWS, DIMENSION))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def index(corpus: Path, vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """With embeddings as `mm data score INDEX embeddings` writes them, in four files."""
    index = build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("heads") / "index"))
    scores = Scores(index, "embeddings")
    summary = ScoresSummary(
        index_fingerprint=index.summary.fingerprint,
        kind="embeddings",
        settings={"model": "made up"},
        columns=(),
        vectors={"image": DIMENSION},
        chunk_rows=100,
    )
    scores.begin(summary)
    for chunk in range(len(scores.values)):
        first, last = scores.values.bounds(chunk)
        present = np.arange(first, last) % ABSENT > 0
        scores.values.write(chunk, pa.table({"image": vectors_column(np.where(present[:, None], vectors[first:last], 0), present)}))
    scores.save(summary.model_copy(update={"complete": True}))
    return index


def weights(folder: Path, inputs: int = DIMENSION, outputs: int = 1) -> tuple[str, str]:
    torch.manual_seed(5)
    file = folder / f"head-{inputs}-{outputs}.safetensors"
    save_file({"0.weight": torch.randn(8, inputs), "0.bias": torch.randn(8), "2.weight": torch.randn(outputs, 8)}, file)
    return str(file), hashlib.sha256(file.read_bytes()).hexdigest()


def torchs(file: str, vectors: np.ndarray) -> np.ndarray:
    head = load_file(file)
    hidden = torch.nn.functional.linear(torch.from_numpy(vectors.astype(np.float32)), head["0.weight"], head["0.bias"]).relu()
    return torch.nn.functional.linear(hidden, head["2.weight"]).numpy()


def test_scores_are_torchs_and_rules_read_them(index: Index, vectors: np.ndarray, tmp_path: Path) -> None:
    file, digest = weights(tmp_path, outputs=2)
    summary = score_by_head(index, HeadScore(file, digest, "embeddings"), name="two")
    assert summary.columns == ("score_0", "score_1")
    found, wanted, there = pa.concat_tables(Scores(index, "two").values.tables()), torchs(file, vectors), np.arange(ROWS) % ABSENT > 0
    for i, name in enumerate(summary.columns):
        np.testing.assert_allclose(found[name].to_numpy()[there], wanted[there, i], atol=1e-5)
        assert np.isnan(found[name].to_numpy()[~there]).all()
    rules = {"best": {"rule": "score", "scores": "two", "column": "score_1", "top": 0.1}}
    filter_index(index, RuleSet.parse(rules, where="test"), "best")
    order = np.argsort(-wanted[:, 1] + 1e9 * ~there)
    assert set(compile_kept(index, ["best"]).ordinals.tolist()) == set(order[: round(0.1 * there.sum())].tolist())


def test_chunks_that_are_there_are_not_scored_again(index: Index, tmp_path: Path) -> None:
    file, digest = weights(tmp_path)
    head = HeadScore(file, digest, "embeddings")
    score_by_head(index, head, name="once")
    scores = Scores(index, "once")
    whole = [table.combine_chunks() for table in scores.values.tables()]
    scores.save(scores.complete("").model_copy(update={"complete": False}))
    scores.values.write(1, pa.table({"score": pa.array([9.0] * 100, pa.float32())}))
    Path(scores.url, "values", "00002.parquet").unlink()
    seen: list[int] = []
    score_by_head(index, head, name="once", on_progress=seen.append)
    assert seen == [230, 100]
    after = [table.combine_chunks() for table in scores.values.tables()]
    assert [one.equals(other) for one, other in zip(whole, after, strict=True)] == [True, False, True, True]


def test_heads_that_do_not_fit_are_refused_and_write_nothing(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file, digest = weights(tmp_path)
    wide, wide_digest = weights(tmp_path, 24)
    score_images(index)
    for head, says in (
        (HeadScore("missing.safetensors", digest, "embeddings"), r"no weights at missing\.safetensors.*no such file"),
        (HeadScore("nobody/nothing:head.safetensors", digest, "embeddings"), "no weights at nobody/nothing:head"),
        (HeadScore(str(tmp_path), digest, "embeddings"), "no weights at"),
        (HeadScore(file, "0" * 64, "embeddings"), f"has SHA-256 {digest}, not {'0' * 64}"),
        (HeadScore(wide, wide_digest, "embeddings"), "takes embeddings of 24 numbers, those of 'embeddings' have 16"),
        (HeadScore(file, digest, "nothing"), r"make them: mm data score \S+ embeddings --model MODEL --name nothing"),
        (HeadScore(file, digest, "image"), r"'image' of \S+ are no embeddings"),
    ):
        with pytest.raises((DataError, ConfigError), match=says):
            score_by_head(index, head, name="refused")
    assert not Path(index.url, "scores", "refused").exists()


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(mm.app, ["data", "score", *arguments, "--json"], catch_exceptions=False)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_command_line_lays_a_head(index: Index, vectors: np.ndarray, tmp_path: Path) -> None:
    file, digest = weights(tmp_path)
    said = run(index.url, "head", "--weights", file, "--sha256", digest, "--output", "sigmoid")
    assert (said["name"], said["columns"]) == ("head", ["score"])
    found, there = pa.concat_tables(Scores(index, "head").values.tables())["score"].to_numpy(), np.arange(ROWS) % ABSENT > 0
    np.testing.assert_allclose(found[there], 1 / (1 + np.exp(-torchs(file, vectors)[there, 0])), atol=1e-5)
    with pytest.raises(ConfigError, match="holds scores by other settings"):
        run(index.url, "head", "--weights", file, "--sha256", digest)
    with pytest.raises(ConfigError, match="a head needs --weights"):
        run(index.url, "head", "--sha256", digest)
    with pytest.raises(ConfigError, match="a head needs --sha256"):
        run(index.url, "head", "--weights", file)
