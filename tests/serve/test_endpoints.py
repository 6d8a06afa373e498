"""What the endpoint answers over HTTP is what the bundle computes, in OpenAI's shape, in the order asked."""

from __future__ import annotations

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jsonschema
import numpy as np
import pytest
import torch
from openai import NotFoundError, OpenAI
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from mm_core.bundle import Bundle
from mm_core.data.image import decode_centre
from mm_core.model_digest import model_digest
from serve.config import ServeConfig
from serve.run import Server

TEXTS = ["a red circle", "two blue squares", "ein roter Kreis ✓"]


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (60, 45)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def expected(bundle: Bundle, value: str | bytes) -> np.ndarray:
    if isinstance(value, str):
        return bundle.text_features([value])[0]
    return bundle.image_features(decode_centre(value, bundle.image_size)[None])[0]


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json() == {"status": "ready", "models": [{"name": "tiny", "answers": {"models:/tiny/1": 100.0}, "refused": None}]}


def test_models_tell_what_they_are_and_answer(client: httpx.Client, bundle: Bundle, bundle_folder: Path) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny"
    assert card["endpoints"] == ["embeddings", "classify", "match", "search"]
    assert card["label_sets"] == ["shapes"]
    (version,) = card["versions"]
    assert (version["dimensions"], version["image_size"], version["context_length"]) == (16, 32, 16)
    assert version["digest"] == model_digest(bundle_folder)
    assert version["logit_scale"] == pytest.approx(bundle.logit_scale)
    assert version["card"].startswith("---")
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_an_image_has_the_features_of_the_bundle(client: httpx.Client, bundle: Bundle, kind: str) -> None:
    data = picture(1, kind.upper())
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": data_uri(data, kind)}).json()
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected(bundle, data), atol=1e-5)


def test_features_are_those_of_transformers_own_model(client: httpx.Client, bundle: Bundle, bundle_folder: Path) -> None:
    """On the same pixels and texts, to 1e-5: the bundle's folder is what `CLIPModel.from_pretrained` loads."""
    model, tokenizer = CLIPModel.from_pretrained(bundle_folder).eval(), AutoTokenizer.from_pretrained(bundle_folder)
    mean, std = (np.asarray(v, dtype=np.float32) for v in (bundle.towers.mean, bundle.towers.std))
    pixels = torch.from_numpy((decode_centre(picture(4), bundle.image_size) / np.float32(255) - mean) / std).permute(2, 0, 1)[None]
    ids = tokenizer([TEXTS[0]], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        image = torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output)
        text = torch.nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output)
    answer = client.post("/v1/embeddings", json={"input": [data_uri(picture(4)), TEXTS[0]]}).json()
    for row, theirs in zip(answer["data"], (image, text), strict=True):
        np.testing.assert_allclose(row["embedding"], theirs[0].numpy(), atol=1e-5)


def test_texts_and_images_in_one_call_keep_their_order(client: httpx.Client, bundle: Bundle) -> None:
    values: list[str | bytes] = [TEXTS[0], picture(1), picture(2, "PNG"), TEXTS[1], picture(3), TEXTS[2]]
    inputs = [value if isinstance(value, str) else data_uri(value) for value in values]
    answer = client.post("/v1/embeddings", json={"input": inputs}).json()
    assert [row["index"] for row in answer["data"]] == list(range(len(values)))
    vectors = np.array([row["embedding"] for row in answer["data"]])
    np.testing.assert_allclose(vectors, np.stack([expected(bundle, value) for value in values]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_answer_has_openais_shape(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": "a red circle", "user": "me"}).json()
    assert set(answer) == {"object", "data", "model", "usage"}
    assert answer["object"] == "list"
    assert answer["data"][0]["object"] == "embedding"
    assert answer["model"] == "tiny"


def test_usage_counts_the_tokens_that_the_model_read(client: httpx.Client, bundle: Bundle) -> None:
    long = "circle " * 25
    answer = client.post("/v1/embeddings", json={"input": [TEXTS[0], long, data_uri(picture(1))]}).json()
    context = bundle.model.config.text_config.max_position_embeddings
    tokens = len(bundle.tokenizer(TEXTS[0])["input_ids"]) + context
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_base64_vectors_are_the_same_float32(client: httpx.Client) -> None:
    plain = client.post("/v1/embeddings", json={"input": TEXTS}).json()
    packed = client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    for one, other in zip(plain["data"], packed["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(other["embedding"]), dtype="<f4")
        np.testing.assert_allclose(vector, one["embedding"], atol=1e-6)


def test_dimensions_shorten_vectors_as_openai_does(client: httpx.Client) -> None:
    """The first so many, of length 1 again."""
    whole, short = (
        np.array([row["embedding"] for row in client.post("/v1/embeddings", json={"input": TEXTS} | more).json()["data"]])
        for more in ({}, {"dimensions": 5})
    )
    np.testing.assert_allclose(short, whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True), atol=1e-6)


def test_a_text_that_looks_like_a_uri_can_be_said_to_be_one(client: httpx.Client, bundle: Bundle) -> None:
    texts = ["data:image/png;base64,xx", "data: the new oil"]
    answer = client.post("/v1/embeddings", json={"input": [{"text": texts[0]}, texts[1], {"image": data_uri(picture(1))}]}).json()
    vectors = [row["embedding"] for row in answer["data"]]
    np.testing.assert_allclose(vectors, np.stack([expected(bundle, value) for value in (*texts, picture(1))]), atol=1e-5)


def test_a_form_is_another_spelling_of_the_same(client: httpx.Client, bundle: Bundle) -> None:
    parts = [
        ("input", (None, TEXTS[0])),
        ("input", ("a.jpg", picture(1), "image/jpeg")),
        ("input", (None, TEXTS[1])),
        ("dimensions", (None, "16")),
    ]
    answer = client.post("/v1/embeddings", files=parts)
    assert answer.status_code == 200, answer.text
    vectors = [row["embedding"] for row in answer.json()["data"]]
    np.testing.assert_allclose(vectors, np.stack([expected(bundle, value) for value in (TEXTS[0], picture(1), TEXTS[1])]), atol=1e-5)
    parts = [("image", ("a.jpg", picture(1), "image/jpeg")), ("labels", (None, "star"))]
    assert client.post("/v1/classify", files=parts).json()["scores"] == [{"label": "star", "score": 1.0}]


def test_openais_own_client_works(server: Server, bundle: Bundle) -> None:
    """It asks for base64 and decodes that itself."""
    openai = OpenAI(base_url=f"{server.url}/v1", api_key="none is needed", max_retries=0)
    answer = openai.embeddings.create(model="tiny", input=[TEXTS[0], data_uri(picture(2))])
    np.testing.assert_allclose([row.embedding for row in answer.data], [expected(bundle, v) for v in (TEXTS[0], picture(2))], atol=1e-5)
    assert answer.usage.total_tokens > 0
    assert [model.id for model in openai.models.list()] == ["tiny"]
    with pytest.raises(NotFoundError, match="text-embedding-3-small"):
        openai.embeddings.create(model="text-embedding-3-small", input="x")


def test_texts_of_all_lengths_in_one_call_do_not_change_one_another(client: httpx.Client, bundle: Bundle) -> None:
    """They are computed in buckets, without the padding that none of a bucket needs."""
    texts = ["circle " * count + "." for count in (1, 2, 5, 9, 14, 25, 3, 1)]
    answer = client.post("/v1/embeddings", json={"input": texts}).json()
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], [expected(bundle, text) for text in texts], atol=1e-5)


def test_requests_that_share_a_batch_get_their_own_vectors(client: httpx.Client, bundle: Bundle) -> None:
    values = [picture(seed) for seed in range(6)]

    def ask(data: bytes) -> list[float]:
        return client.post("/v1/embeddings", json={"input": data_uri(data)}).json()["data"][0]["embedding"]

    with ThreadPoolExecutor(len(values)) as threads:
        vectors = list(threads.map(ask, values))
    np.testing.assert_allclose(vectors, np.stack([expected(bundle, value) for value in values]), atol=1e-5)


def test_classify_gives_the_softmax_over_the_mean_of_the_templates(client: httpx.Client, bundle: Bundle) -> None:
    data, labels, templates = picture(4), ["red circle", "blue square", "star"], ["a {c}", "a picture of a {c}."]
    body = {"image": data_uri(data), "labels": labels, "templates": templates}
    answer = client.post("/v1/classify", json=body).json()
    classes = np.stack([np.mean([expected(bundle, t.replace("{c}", label)) for t in templates], axis=0) for label in labels])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    with torch.no_grad():
        logits = bundle.logit_scale * classes @ expected(bundle, data)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    scores = [row["score"] for row in answer["scores"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-6)
    found = {row["label"]: row["score"] for row in answer["scores"]}
    assert found == pytest.approx(dict(zip(labels, probabilities.tolist(), strict=True)), abs=1e-4)


def test_a_label_set_is_known_by_name_and_gives_what_its_labels_give(client: httpx.Client) -> None:
    image = data_uri(picture(4))
    by_name = client.post("/v1/classify", json={"image": image, "label_set": "shapes"}).json()["scores"]
    templates, labels = ["a {c}", "a picture of a {c}."], ["red circle", "blue square", "star"]
    given = client.post("/v1/classify", json={"image": image, "labels": labels, "templates": templates}).json()["scores"]
    assert [row["label"] for row in by_name] == [row["label"] for row in given]
    assert [row["score"] for row in by_name] == pytest.approx([row["score"] for row in given], abs=1e-6)
    best = client.post("/v1/classify", json={"image": image, "label_set": "shapes", "top_k": 1}).json()["scores"]
    assert best == [pytest.approx(by_name[0])] or best[0]["label"] == by_name[0]["label"]


def test_match_gives_the_cosine_of_every_image_with_every_text(client: httpx.Client, bundle: Bundle) -> None:
    pictures = [picture(1), picture(2)]
    answer = client.post("/v1/match", json={"images": [data_uri(p) for p in pictures], "texts": TEXTS}).json()
    assert answer["kind"] == "cosine"
    wanted = np.stack([expected(bundle, p) for p in pictures]) @ np.stack([expected(bundle, t) for t in TEXTS]).T
    np.testing.assert_allclose(answer["scores"], wanted, atol=1e-5)


def test_metrics_count_what_was_asked_and_what_came_out(client: httpx.Client) -> None:
    def value(name: str) -> float:
        page = re.sub('gateway="[^"]+",', "", client.get("/metrics").text)
        line = next((line for line in page.splitlines() if line.startswith(name)), "x 0")
        return float(line.rsplit(" ", 1)[1])

    asked = 'mm_requests_total{route="/v1/match",status="200"}'
    norms = 'mm_embedding_norm_count{kind="image",model="tiny"'
    before = value(asked), value(norms)
    client.post("/v1/match", json={"images": [data_uri(picture(1))], "texts": TEXTS})
    assert (value(asked), value(norms)) == (before[0] + 1, before[1] + 1)
    assert value('mm_top_score_count{model="tiny",route="match"') >= 1
    assert value('mm_version_percent{model="tiny"') == 100


def test_a_request_keeps_the_id_its_caller_gave(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"x-request-id": "mine-1"}).headers.get_list("x-request-id") == ["mine-1"]
    first, second = (client.get("/v1/models").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_every_request_is_a_line_of_json(client: httpx.Client, serve_config: ServeConfig) -> None:
    """What was asked is not in it."""
    client.post("/v1/embeddings", json={"input": ["very private", TEXTS[0]]}, headers={"x-request-id": "mine-2"})
    lines = [line for path in Path(serve_config.log_folder or "").iterdir() for line in path.read_text().splitlines()]
    (mine,) = (json.loads(line) for line in lines if '"mine-2"' in line)
    told = {"method": "POST", "path": "/v1/embeddings", "status": 200, "inputs": 2, "model": "tiny", "version": "models:/tiny/1"}
    assert {name: mine[name] for name in told} == told
    assert mine["ms"] > 0
    assert not any("very private" in line for line in lines)


def test_openapi_describes_every_route_with_examples_that_work(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    asked = ("/v1/embeddings", "/v1/classify", "/v1/match", "/v1/search")
    looked_at = {"/v1/search/map", "/v1/search/items/{item}/thumbnail", "/v1/models", "/v1/models/{name}"}
    assert set(document["paths"]) == {"/healthz", "/readyz", "/metrics", *looked_at, *asked}
    schemas = document["components"]["schemas"]
    for path in asked:
        operation = document["paths"][path]["post"]
        assert {"200", "400", "413", "422", "429"} <= set(operation["responses"])
        assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
        for status in ("400", "413", "422", "429"):
            assert "application/problem+json" in operation["responses"][status]["content"]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert schemas[name]["examples"]
        for example in schemas[name]["examples"]:
            answer = client.post(path, json=example)
            assert answer.status_code == 200, answer.text
            shape = operation["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema.validate(answer.json(), shape | {"components": document["components"]})
