"""A model that reads a picture and a text at once matches them so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from mm_core.bundle import load_bundle, write_bundle
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
from tests.serve.test_endpoints import data_uri, picture

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


def post(folder: Path, path: str, body: dict[str, Any]) -> httpx.Response:
    """To an endpoint over the bundle, its deployments in this process."""

    async def request() -> httpx.Response:
        encoder = Encoder(str(folder), Compute(max_batch_size=4), Folders())
        preparer = Preparer.__new__(Preparer)
        await preparer.__init__(SimpleNamespace(preparation=SimpleNamespace(remote=encoder.preparation)), 10_000)  # type: ignore[misc]

        async def ask(_: str, part: Part, inputs: Sequence[str | Picture]) -> Any:
            (answer,) = await getattr(encoder, part)(await preparer.prepare([inputs]))
            return answer

        version = Version(application="a", reference="flava", facts=await encoder.facts())
        config = ServeConfig(bounds=Bound(max_inputs=8))
        upstream = Upstream(config.bounds.max_waiting_inputs, Measured(), ask)
        upstream.follow(Traffic(slots=(Slot(name="flava", shares=(Share(version=version, percent=100),)),)))
        app = create_app(config, [version.facts.task], upstream)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(path, json=body)

    return asyncio.run(request())


def test_pictures_and_texts_are_matched_by_the_fusion(folder: Path) -> None:
    pictures, bundle = [picture(1), picture(2)], load_bundle(folder)
    answer = post(folder, "/v1/match", {"images": [data_uri(p) for p in pictures], "texts": TEXTS}).json()
    assert answer["kind"] == "matching"
    pixels = [decode_centre(p, bundle.image_size) for p in pictures]
    expected = [[float(bundle.match(image[None], [text])[0]) for text in TEXTS] for image in pixels]
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)
    assert len({round(score, 6) for row in expected for score in row}) == 6, "the model tells all pairs apart"


def test_too_many_pairs(folder: Path) -> None:
    answer = post(folder, "/v1/match", {"images": [data_uri(picture(1))] * 3, "texts": TEXTS})
    assert answer.status_code == 413
    assert "9 pairs" in answer.json()["detail"]


def test_a_picture_that_cannot_be_read_is_named(folder: Path) -> None:
    answer = post(folder, "/v1/match", {"images": [data_uri(picture(1)), data_uri(picture(2)[:200])], "texts": TEXTS})
    assert answer.status_code == 422
    assert "images.1" in answer.json()["detail"]
