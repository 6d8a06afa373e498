"""What finds the nearest: exact where it says so, its recall measured where not, filters kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mm_core.errors import ConfigError, DataError
from mm_core.search import nearest as module
from mm_core.search.nearest import Codes, Kind, Nearest, Queries, build

ROWS, WIDTH = 4000, 32


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """In clusters, as embeddings lie."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(40, WIDTH))
    drawn = centres[random.integers(0, 40, ROWS)] + 0.4 * random.normal(size=(ROWS, WIDTH))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    return vectors[::200].astype(np.float32)


def brute(vectors: np.ndarray, queries: np.ndarray, count: int, among: np.ndarray | None = None) -> np.ndarray:
    scores = queries @ vectors.astype(np.float32).T
    if among is not None:
        scores[:, ~among] = -2
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


Make = Callable[[Kind, Codes], Nearest]


@pytest.fixture(scope="module")
def make(vectors: np.ndarray, queries: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Each once: faiss takes seconds to train product quantisation."""
    folder = tmp_path_factory.mktemp("nearest")

    @cache
    def made(kind: Kind, codes: Codes) -> Nearest:
        path = folder / f"{kind}-{codes}.faiss"
        about = build(vectors, path, [Queries("images", queries, skip_first=True)], kind=kind, codes=codes, recall=0.95)
        return Nearest.open(path, vectors, about)

    return made


def test_few_vectors_are_searched_exactly(vectors: np.ndarray, queries: np.ndarray, make: Make) -> None:
    index = make("auto", "fp16")
    assert (index.about.kind, index.about.recall) == ("exact", ())
    scores, rows = index.search(queries, 10)
    expected = brute(vectors, queries, 10)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.astype(np.float32).T, expected, 1), atol=1e-3)
    np.testing.assert_array_equal(index.exact(queries, 10), expected)


@pytest.mark.parametrize(("kind", "codes"), [("ivf", "fp16"), ("ivf", "int8"), ("ivf", "pq"), ("hnsw", "fp16"), ("hnsw", "int8")])
def test_the_recall_that_is_stored_is_the_one_there_is(
    vectors: np.ndarray, queries: np.ndarray, make: Make, kind: Kind, codes: Codes
) -> None:
    index = make(kind, codes)
    (stored,) = index.about.recall
    assert stored.at_10 >= 0.95, index.about
    _, rows = index.search(queries, 11)
    found = np.mean([len(set(a[1:]) & set(b[1:])) / 10 for a, b in zip(rows, brute(vectors, queries, 11), strict=True)])
    assert found == pytest.approx(stored.at_10, abs=0.01)
    scores, rows = index.search(queries, 5)
    np.testing.assert_allclose(
        scores, np.einsum("qkd,qd->qk", vectors[rows].astype(np.float32), queries), atol=2e-2 if codes == "fp16" else 1e-5
    )


def test_smaller_codes_are_smaller(vectors: np.ndarray, queries: np.ndarray, make: Make) -> None:
    sizes = [make("ivf", codes).about.bytes for codes in ("fp16", "int8", "pq")]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("share", [0.5, 0.02])
@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_a_filter_leaves_only_what_meets_it(
    vectors: np.ndarray, queries: np.ndarray, make: Make, kind: Kind, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make(kind, "fp16")
    among = np.random.default_rng(1).random(ROWS) < share
    expected = brute(vectors, queries, 10, among)
    np.testing.assert_array_equal(index.search(queries, 10, among=among)[1], expected)  # few: all are compared
    monkeypatch.setattr(module, "_BRUTE_ROWS", 0)
    _, rows = index.search(queries, 5, among=among)  # by the index itself
    assert among[rows[rows >= 0]].all()
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows, expected[:, :5], strict=True)]) > 0.9


def test_nothing_is_made_up_where_there_is_too_little(vectors: np.ndarray, queries: np.ndarray, make: Make) -> None:
    index = make("exact", "fp16")
    among = np.zeros(ROWS, dtype=bool)
    among[7] = True
    scores, rows = index.search(queries[:1], 5, among=among)
    assert rows.tolist() == [[7, -1, -1, -1, -1]]
    assert np.isneginf(scores[0, 1:]).all()
    assert index.search(queries[:1], 10 * ROWS)[1].shape == (1, ROWS)


def test_codes_of_an_exact_index_are_refused(vectors: np.ndarray, queries: np.ndarray, make: Make) -> None:
    with pytest.raises(ConfigError, match="--codes int8"):
        make("exact", "int8")


def test_an_index_of_other_vectors_or_a_damaged_one_is_named(vectors: np.ndarray, queries: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "exact.faiss"
    about = build(vectors, path, [], kind="exact")
    with pytest.raises(DataError, match="does not belong"):
        Nearest.open(path, vectors[:100], about)
    (tmp_path / "bad.faiss").write_bytes(b"nothing of faiss")
    with pytest.raises(DataError, match=r"bad\.faiss.*mm search-index"):
        Nearest.open(tmp_path / "bad.faiss", vectors, about)
