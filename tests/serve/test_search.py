"""`/v1/search` finds what comparing every vector finds; filters, pages, pictures from the shards."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_core.bundle import Bundle
from mm_core.data.image import decode_centre, decode_whole
from mm_core.data.index import Index
from mm_core.data.reader import IndexReader
from mm_core.search.embeddings import read_embeddings_summary, read_search_summary
from tests.serve.test_bad_input import refused
from tests.serve.test_endpoints import data_uri, picture

ROWS = 60


@pytest.fixture(scope="module")
def index(searchable: Path) -> Index:
    return Index.open(read_search_summary(searchable).index_url)


@pytest.fixture(scope="module")
def samples(index: Index) -> list[tuple[str, bytes, list[str]]]:
    """uid, picture, captions."""
    return [(s.uid, s.image or b"", s.captions) for s in IndexReader(index).read(np.arange(ROWS, dtype=np.uint64))]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def images(bundle: Bundle, samples: list[tuple[str, bytes, list[str]]]) -> np.ndarray:
    return bundle.image_features(np.stack([decode_centre(data, bundle.image_size) for _, data, _ in samples]))


def nearest(vectors: np.ndarray, query: np.ndarray, count: int) -> list[int]:
    return np.argsort(-(vectors @ query), kind="stable")[:count].tolist()


def same(found: list[dict], vectors: np.ndarray, query: np.ndarray, count: int) -> None:
    """The scores are those of the best `count`; where two are as good, to float16, either may come first."""
    scores = np.sort(vectors @ query)[::-1][:count]
    np.testing.assert_allclose([row["score"] for row in found], scores, atol=2e-3)
    np.testing.assert_allclose([row["score"] for row in found], [vectors[row["item"]] @ query for row in found], atol=2e-3)


def test_what_is_embedded_is_what_the_endpoint_answers(client: httpx.Client, searchable: Path, samples: list, images: np.ndarray) -> None:
    """One vector of `mm embed`, of the bundle and of /v1/embeddings: float16 beside float32."""
    stored = np.load(searchable / "search" / "images.npy")
    np.testing.assert_allclose(stored, images, atol=5e-4)
    answer = client.post("/v1/embeddings", json={"input": [data_uri(samples[3][1]), samples[3][2][0]]}).json()
    np.testing.assert_allclose(answer["data"][0]["embedding"], images[3], atol=1e-5)
    summary = read_embeddings_summary(searchable)
    assert summary is not None
    assert (summary.samples, summary.model) == (ROWS, "models:/tiny/1")
    values = pq.read_table(searchable / "values" / "00000.parquet")
    captions = np.frombuffer(values["texts"][3].as_py(), dtype="<f2").reshape(-1, 16)
    np.testing.assert_allclose(captions[0], answer["data"][1]["embedding"], atol=5e-4)


def test_words_find_pictures(client: httpx.Client, bundle: Bundle, images: np.ndarray, samples: list) -> None:
    answer = client.post("/v1/search", json={"text": "a red circle", "limit": 7}).json()
    same(answer["results"], images, bundle.text_features(["a red circle"])[0], 7)
    for row in answer["results"]:
        uid, _, captions = samples[row["item"]]
        assert (row["uid"], row["caption"]) == (uid, captions[0])
    assert (answer["offset"], answer["next_offset"]) == (0, 7)


def test_a_picture_finds_itself_first(client: httpx.Client, samples: list) -> None:
    answer = client.post("/v1/search", json={"image": data_uri(samples[11][1]), "limit": 3}).json()
    assert answer["results"][0]["item"] == 11
    assert answer["results"][0]["score"] == pytest.approx(1, abs=2e-3)
    like = client.post("/v1/search", json={"item": 11, "limit": 3}).json()
    assert [row["item"] for row in like["results"]] == [row["item"] for row in answer["results"]]


def test_a_picture_finds_captions(client: httpx.Client, bundle: Bundle, samples: list, images: np.ndarray) -> None:
    texts = [caption for _, _, captions in samples for caption in captions]
    answer = client.post("/v1/search", json={"image": data_uri(samples[5][1]), "target": "texts", "limit": 4}).json()
    scores = np.sort(bundle.text_features(texts) @ images[5])[::-1][:4]
    np.testing.assert_allclose([row["score"] for row in answer["results"]], scores, atol=2e-3)
    for row in answer["results"]:
        assert row["caption"] in samples[row["item"]][2]


def test_a_picture_and_words_are_weighed(client: httpx.Client, bundle: Bundle, samples: list, images: np.ndarray) -> None:
    query = 0.3 * bundle.text_features(["a star"])[0] + 0.7 * images[8]
    body = {"image": data_uri(samples[8][1]), "text": "a star", "text_weight": 0.3, "limit": 5}
    same(client.post("/v1/search", json=body).json()["results"], images, query / np.linalg.norm(query), 5)


def test_pages_follow_one_another_and_end(client: httpx.Client) -> None:
    found: list[int] = []
    offset: int | None = 0
    while offset is not None:
        page = client.post("/v1/search", json={"text": "a star", "limit": 25, "offset": offset}).json()
        found += [row["item"] for row in page["results"]]
        offset = page["next_offset"]
    whole = client.post("/v1/search", json={"text": "a star", "limit": 100}).json()
    assert found == [row["item"] for row in whole["results"]]
    assert sorted(found) == list(range(ROWS))
    assert whole["next_offset"] is None


def test_filters_leave_what_meets_them(client: httpx.Client, samples: list) -> None:
    word = samples[0][2][0].split()[-1]
    filters = [{"field": "caption", "op": "contains", "value": word}, {"field": "width", "op": ">=", "value": 1}]
    found = client.post("/v1/search", json={"text": "a star", "limit": 100, "filters": filters}).json()["results"]
    assert {row["item"] for row in found} == {i for i, (_, _, captions) in enumerate(samples) if word.lower() in captions[0].lower()}
    assert all(row["metadata"]["width"] == 48 for row in found)
    captions = client.post("/v1/search", json={"text": "a star", "target": "texts", "limit": 400, "filters": filters}).json()["results"]
    assert {row["item"] for row in captions} == {row["item"] for row in found}


def test_thumbnails_are_the_pictures_of_the_shards(client: httpx.Client, samples: list) -> None:
    row = client.post("/v1/search", json={"item": 4, "limit": 1}).json()["results"][0]
    answer = client.get(f"/{row['thumbnail']}", params={"side": 32})
    assert answer.headers["content-type"] == "image/jpeg"
    shown = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB")).astype(int)
    expected = decode_whole(samples[row["item"]][1], 32)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 8
    assert "max-age" in answer.headers["cache-control"]


def test_what_is_searched_is_told(client: httpx.Client) -> None:
    about = client.get("/v1/search").json()
    assert (about["items"], about["model"], about["images"]["kind"]) == (ROWS, "models:/tiny/1", "exact")
    assert {"width", "label", "uid", "caption"} <= set(about["fields"])
    plane = client.get("/v1/search/map").json()
    assert plane["item"] == list(range(ROWS))
    assert all(0 <= value <= 1 for value in plane["x"] + plane["y"])


BAD = {
    "nothing": ({}, 422, ("text",)),
    "an item and words": ({"item": 1, "text": "x"}, 422, ("item",)),
    "no such item": ({"item": ROWS}, 404, ("item", "60")),
    "an unknown field": ({"text": "x", "filters": [{"field": "widht", "value": 1}]}, 422, ("widht", "width")),
    "a field of another kind": ({"text": "x", "filters": [{"field": "width", "value": "wide"}]}, 422, ("width",)),
    "an empty text": ({"text": " "}, 422, ("text", "empty")),
    "a bad picture": ({"image": data_uri(b"no")}, 422, ("image", "not_an_image")),
    "too far": ({"text": "x", "limit": 900, "offset": 200}, 422, ("1,100", "1,000")),
    "a weight above 1": ({"text": "x", "image": data_uri(picture(1)), "text_weight": 2}, 422, ("text_weight",)),
    "no limit": ({"text": "x", "limit": 0}, 422, ("limit",)),
}


@pytest.mark.parametrize("case", BAD)
def test_search_refuses(client: httpx.Client, case: str) -> None:
    body, status, words = BAD[case]
    refused(client.post("/v1/search", json=body), status, *words)


def test_a_thumbnail_of_nothing_is_refused(client: httpx.Client) -> None:
    refused(client.get("/v1/search/items/999/thumbnail"), 404, "999")
    refused(client.get("/v1/search/items/-1/thumbnail"), 404)
    refused(client.get("/v1/search/items/0/thumbnail", params={"side": 5000}), 422, "side")
    refused(client.get("/v1/search/items/x/thumbnail"), 422)
