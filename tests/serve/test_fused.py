"""A model that reads a picture and a text at once matches them so, and gives one vector of both."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import torch

import mm
from mm_core.bundle import MANIFEST, Bundle, load_bundle, write_bundle
from mm_core.data.image import decode_centre
from mm_core.models.codebook import CodebookSizes
from mm_core.models.family import build_model
from mm_core.models.flava import FlavaConfig
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from serve.app import create_app
from serve.config import Bound, Compute, ServeConfig
from serve.encoder import Encoder
from serve.facts import Version
from serve.inputs import Picture
from serve.measured import Measured
from serve.prepare import Preparer
from serve.store import Folders
from serve.traffic import Share, Slot, Traffic
from serve.upstream import Part, Upstream
from tests.serve.test_endpoints import data_uri, expected, picture

T = TypeVar("T")
TEXTS = ["a red circle", "two blue squares on a white ground", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "flava"
    tokenizer = train_bpe(TEXTS, vocab_size=300, context_length=16)
    tower = TowerConfig(width=24, layers=2, heads=2)
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 8, "context_length": 16, "text_positions": 16, "embed_dim": 16}
    codebook = CodebookSizes(width=4, blocks_per_group=1, entries=12)
    config = FlavaConfig(**sizes, vocab_size=len(tokenizer), vision=tower, text=tower, fusion=tower, codebook=codebook)
    torch.manual_seed(0)
    model = build_model(config, special_tokens(tokenizer))
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe="flava-tiny", data_fingerprint="f" * 32, metrics={})
    return folder


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`ray.serve.batch` works in replicas alone: here whoever waits is computed together. How many each time."""
    counts: list[int] = []

    def batch(compute: Callable[[list[Any]], Awaitable[list[Any]]], **_: Any) -> Callable[[Any], Awaitable[Any]]:
        waiting: list[tuple[Any, asyncio.Future[Any]]] = []

        async def one(part: Any) -> Any:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            waiting.append((part, answer))
            await asyncio.sleep(0.01)
            if group := waiting[:]:
                waiting.clear()
                counts.append(len(group))
                for (_, future), result in zip(group, await compute([part for part, _ in group]), strict=True):
                    future.set_result(result)
            return await answer

        return one

    monkeypatch.setattr("ray.serve.batch", batch)
    return counts


@pytest.fixture(scope="module")
def fused(folder: Path) -> Bundle:
    return load_bundle(folder)


def both(bundle: Bundle, image: bytes, text: str) -> np.ndarray:
    """Of the fusion."""
    return bundle.multimodal_features(decode_centre(image, bundle.image_size)[None], [text])[0]


def pair(image: bytes, text: str) -> dict[str, str]:
    return {"image": data_uri(image), "text": text}


def asked(folder: Path, ask: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """Of an endpoint over the bundle, its deployments in this process."""

    async def request() -> T:
        encoder = Encoder(str(folder), Compute(max_batch_size=4), Folders())
        preparer = Preparer.__new__(Preparer)
        await preparer.__init__(SimpleNamespace(preparation=SimpleNamespace(remote=encoder.preparation)), 10_000)  # type: ignore[misc]

        async def model(_: str, part: Part, inputs: Sequence[str | Picture]) -> Any:
            (answer,) = await getattr(encoder, part)(await preparer.prepare([inputs]))
            return answer

        version = Version(application="a", reference="flava", facts=await encoder.facts())
        config = ServeConfig(bounds=Bound(max_inputs=8))
        upstream = Upstream(config.bounds.max_waiting_inputs, Measured(), model)
        upstream.follow(Traffic(slots=(Slot(name="flava", shares=(Share(version=version, percent=100),)),)))
        app = create_app(config, [version.facts.task], upstream)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await ask(client)

    return asyncio.run(request())


def post(folder: Path, path: str, body: dict[str, Any]) -> httpx.Response:
    return asked(folder, lambda client: client.post(path, json=body))


def test_pictures_and_texts_are_matched_by_the_fusion(folder: Path, fused: Bundle) -> None:
    pictures = [picture(1), picture(2)]
    answer = post(folder, "/v1/match", {"images": [data_uri(p) for p in pictures], "texts": TEXTS}).json()
    assert answer["kind"] == "matching"
    pixels = [decode_centre(p, fused.image_size) for p in pictures]
    scores = [[float(fused.match(image[None], [text])[0]) for text in TEXTS] for image in pixels]
    np.testing.assert_allclose(answer["scores"], scores, atol=1e-5)
    assert len({round(score, 6) for row in scores for score in row}) == 6, "the model tells all pairs apart"


def test_a_folder_that_mm_did_not_write_is_matched_by_the_fusion_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / MANIFEST).unlink()
    body = {"images": [data_uri(picture(1))], "texts": TEXTS}
    plain, ours = (post(one, "/v1/match", body).json() for one in (tmp_path / "plain", folder))
    assert plain["kind"] == "matching"
    np.testing.assert_allclose(plain["scores"], ours["scores"], atol=1e-5)


def test_too_many_pairs(folder: Path) -> None:
    answer = post(folder, "/v1/match", {"images": [data_uri(picture(1))] * 3, "texts": TEXTS})
    assert answer.status_code == 413
    assert "9 pairs" in answer.json()["detail"]


def test_a_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    answer = post(folder, "/v1/match", {"images": [data_uri(picture(1)), data_uri(picture(2)[:200])], "texts": TEXTS})
    assert answer.status_code == 422
    assert "images.1" in answer.json()["detail"]


def test_pairs_have_the_features_of_the_fusion_and_kinds_keep_their_order(folder: Path, fused: Bundle) -> None:
    inputs = [TEXTS[0], pair(picture(1), TEXTS[1]), data_uri(picture(2)), pair(picture(2), TEXTS[2]), {"text": TEXTS[1]}]
    answer = post(folder, "/v1/embeddings", {"input": inputs}).json()
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3, 4]
    vectors = [row["embedding"] for row in answer["data"]]
    alone, of_both = [vectors[0], vectors[2], vectors[4]], [vectors[1], vectors[3]]
    np.testing.assert_allclose(alone, [expected(fused, one) for one in (TEXTS[0], picture(2), TEXTS[1])], atol=1e-5)
    np.testing.assert_allclose(of_both, [both(fused, picture(1), TEXTS[1]), both(fused, picture(2), TEXTS[2])], atol=1e-5)
    _, lengths = fused.tokenise.with_lengths([TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[1]])
    assert answer["usage"]["total_tokens"] == lengths.sum()


def test_pairs_of_many_requests_get_each_its_own_vectors(folder: Path, fused: Bundle, together: list[int]) -> None:
    """They are computed together, at the length of the longest."""
    pairs = [(picture(i), TEXTS[i % 3]) for i in range(7)]

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [pairs[:1], pairs[1:5], pairs[5:]]
        return await asyncio.gather(*(client.post("/v1/embeddings", json={"input": [pair(*one) for one in some]}) for some in bodies))

    vectors = [row["embedding"] for answer in asked(folder, ask) for row in answer.json()["data"]]
    np.testing.assert_allclose(vectors, [both(fused, *one) for one in pairs], atol=1e-5)
    assert max(together) > 1


def test_the_client_asks_for_pairs(folder: Path, fused: Bundle) -> None:
    pairs = [(picture(i), TEXTS[i % 3]) for i in range(5)]

    async def ask(client: httpx.AsyncClient) -> tuple[np.ndarray, int | None]:
        async with mm.AsyncClient(batch_size=2) as ours:
            await ours._http.aclose()
            ours._http = client
            return await ours.embed_pairs(pairs), (await ours.models())[0].versions[0].fused_dimensions

    vectors, width = asked(folder, ask)
    np.testing.assert_allclose(vectors, [both(fused, *one) for one in pairs], atol=1e-5)
    assert vectors.shape == (5, width) == (5, 24)


def test_pairs_are_shortened_from_their_own_width(folder: Path, fused: Bundle) -> None:
    """24, where those of one side have 16."""
    one = pair(picture(1), TEXTS[0])
    (row,) = post(folder, "/v1/embeddings", {"input": one, "dimensions": 20}).json()["data"]
    short = both(fused, picture(1), TEXTS[0])[:20]
    np.testing.assert_allclose(row["embedding"], short / np.linalg.norm(short), atol=1e-5)
    for inputs, dimensions, detail in ((one, 25, "24 of a pair, 25 were"), ([one, "x"], 20, "has 16, 20 were")):
        refused = post(folder, "/v1/embeddings", {"input": inputs, "dimensions": dimensions})
        assert refused.status_code == 422
        assert detail in refused.json()["detail"]


def test_what_of_a_pair_is_wrong_is_named(folder: Path) -> None:
    fine = pair(picture(1), TEXTS[0])
    for inputs, status, detail in (
        ([fine, pair(picture(2)[:200], "x")], 422, "input.1.image: "),
        (["x", fine, pair(picture(2), " ")], 422, "input.2.text: the text is empty"),
        (fine | {"image": "no picture"}, 422, "input.0.image: "),
        ([fine] * 5, 413, "10 inputs"),
    ):
        answer = post(folder, "/v1/embeddings", {"input": inputs})
        assert answer.status_code == status
        assert detail in answer.json()["detail"]


def test_two_towers_refuse_a_pair(bundle_folder: Path) -> None:
    answer = post(bundle_folder, "/v1/embeddings", {"input": ["x", pair(picture(1), "x")]})
    assert answer.status_code == 422
    assert "input.1: " in answer.json()["detail"]
    assert "give them as two inputs, or serve a FLAVA model" in answer.json()["detail"]
