"""`mm embed` goes on where it was stopped, gives what the bundle gives, and refuses to mix; `mm search-index` makes it searchable."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import mm
from mm_core.bundle import load_bundle
from mm_core.data.columns import vectors_of
from mm_core.data.index import Index
from mm_core.data.split import split
from mm_core.errors import ConfigError, DataError
from mm_core.search import embeddings
from mm_core.search.embeddings import read_embeddings_summary, read_search_summary, values_of
from mm_core.search.index import SearchIndex
from pipelines import embed as module
from pipelines.embed import embed
from pipelines.index import build_index
from pipelines.search_index import SearchOptions, make_searchable
from tests.serve.conftest import make_bundle

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROWS = 330


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("embed") / "model", 0)


@pytest.fixture(scope="module")
def index(corpus: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("embed") / "index"))


class StoppedError(Exception):
    pass


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "values").glob("*.parquet")}


@pytest.fixture(scope="module")
def stopped(index: Index, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Stopped after some chunks of a hundred rows, then finished; and the files that were there at the stop."""
    out = tmp_path_factory.mktemp("embed") / "vectors"
    seen = 0

    def stop(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen > 200:
            until = time.monotonic() + 120
            while not files(out):  # the first chunk is handed to a task, which may be slow
                assert time.monotonic() < until
                time.sleep(0.05)
            raise StoppedError

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "EmbeddingsSummary", lambda **given: embeddings.EmbeddingsSummary(**given | {"chunk_rows": 100}))
    with pytest.raises(StoppedError):
        embed(str(bundle), "models:/m/1", [index.url], out, actors=1, on_progress=stop)
    with pytest.raises(DataError, match=r"not finished.*again"):
        make_searchable(out, SearchOptions())
    before = files(out)
    embed(str(bundle), "models:/m/1", [index.url], out, actors=1)
    patch.undo()
    return out, before


def test_a_stop_loses_only_what_was_under_way(stopped: tuple[Path, dict[str, int]]) -> None:
    out, before = stopped
    after = files(out)
    assert 0 < len(before) < 4
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def test_vectors_are_those_of_the_bundle_in_float16(stopped: tuple[Path, dict[str, int]], index: Index, bundle: Path) -> None:
    from mm_core.data.decoded import decode_samples
    from mm_core.data.reader import IndexReader

    summary = read_embeddings_summary(stopped[0])
    assert summary is not None
    assert (summary.samples, summary.complete, summary.unreadable) == (ROWS, True, {})
    model = load_bundle(bundle)
    table = values_of(stopped[0], summary).between(95, 105)
    decoded = decode_samples(IndexReader(index), np.arange(95, 105, dtype=np.uint64), model.image_size)
    np.testing.assert_allclose(vectors_of(table["image"], np.float16), model.image_features(decoded.images), atol=5e-4)
    for data, captions in zip(table["texts"].to_pylist(), decoded.captions, strict=True):
        np.testing.assert_allclose(np.frombuffer(data, "<f2").reshape(len(captions), -1), model.text_features(captions), atol=5e-4)


def test_another_model_or_other_samples_are_not_mixed_in(
    stopped: tuple[Path, dict[str, int]], index: Index, bundle: Path, corpus: Path, tmp_path: Path
) -> None:
    other = make_bundle(tmp_path / "other", 1)
    with pytest.raises(ConfigError, match="another --out"):
        embed(str(other), "models:/m/2", [index.url], stopped[0])
    split(index, heldout=0.1, seed=0)
    with pytest.raises(ConfigError, match="another --out"):
        embed(str(bundle), "models:/m/1", [index.url], stopped[0], ledgers=["heldout"])


def test_what_a_ledger_keeps_is_searched_alone(index: Index, bundle: Path, tmp_path: Path) -> None:
    _, heldout = split(index, heldout=0.1, seed=0, names=("a", "b"))
    summary = embed(str(bundle), "models:/m/1", [index.url], tmp_path / "v", ledgers=["b"], actors=1)
    assert summary.samples == heldout.kept
    made = make_searchable(tmp_path / "v", SearchOptions(kind="hnsw", codes="int8"))
    assert made.images is not None
    assert made.images.vectors == heldout.kept
    assert min(one.at_10 for one in made.images.recall) >= 0.95
    found = SearchIndex.open(tmp_path / "v")
    rows, scores = found.search(found.vector(3), 1)
    assert rows[0] == 3
    assert scores[0] == pytest.approx(1, abs=2e-3)
    assert len(found) == heldout.kept


def test_shards_are_indexed_on_the_way_and_only_once(bundle: Path, corpus: Path, tmp_path: Path) -> None:
    embed(str(bundle), "m", [str(corpus / "heldout")], tmp_path / "v", actors=1)
    stamp = os.stat(tmp_path / "v" / "index" / "index.json").st_mtime_ns
    assert embed(str(bundle), "m", [str(corpus / "heldout")], tmp_path / "v", actors=1).complete
    assert os.stat(tmp_path / "v" / "index" / "index.json").st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="other shards"):
        embed(str(bundle), "m", [str(corpus / "train")], tmp_path / "v", actors=1)


@pytest.mark.parametrize("command", ["embed m shards --out s3://bucket/vectors", "search-index s3://bucket/vectors"])
def test_a_store_is_no_place_to_map_vectors_from(command: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/vectors: .* every node sees"):
        CliRunner().invoke(mm.app, command.split(), catch_exceptions=False)


def test_nothing_to_search_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no vectors.*mm embed"):
        make_searchable(tmp_path, SearchOptions())
    with pytest.raises(DataError, match=r"no search index.*mm search-index"):
        read_search_summary(tmp_path)
