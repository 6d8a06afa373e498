"""A tiny bundle and one endpoint over it, shared by the tests of this folder: deploying costs more than all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from mm_core.bundle import Bundle, load_bundle, write_bundle
from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from serve.address import free_port
from serve.cli import wanted_models
from serve.config import Bound, Compute, LabelSet, ServeConfig
from serve.run import Server, look_at, start
from serve.store import Folders


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = train_bpe(["a red circle", "two blue squares"], vocab_size=300, context_length=16)
    tower = TowerConfig(width=32, layers=1, heads=2)
    config = ClipConfig(image_size=32, patch_size=16, context_length=16, vocab_size=len(tokenizer), embed_dim=16, vision=tower, text=tower)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_bundle(
        folder,
        model=build_clip(config, special_tokens(tokenizer)),
        tokenizer=tokenizer,
        config=config,
        recipe="clip-tiny",
        data_fingerprint="f1" * 16,
        metrics={},
    )
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder)


@pytest.fixture(scope="session")
def serve_config() -> ServeConfig:
    """Small bounds, so that breaking them is cheap."""
    bounds = Bound(
        max_requests=8,
        max_inputs=12,
        max_text_characters=200,
        max_image_bytes=50_000,
        max_pixels=1_000_000,
        max_request_bytes=1_000_000,
    )
    shapes = LabelSet(labels=("red circle", "blue square", "star"), templates=("a {c}", "a picture of a {c}."))
    return ServeConfig(port=free_port(), compute=Compute(max_batch_size=4), bounds=bounds, label_sets={"shapes": shapes})


@pytest.fixture(scope="package")
def server(ray_cluster: None, bundle_folder: Path, serve_config: ServeConfig) -> Iterator[Server]:
    running = start(look_at(wanted_models([str(bundle_folder)], ()), serve_config, Folders()))
    yield running
    running.stop()


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as session:
        yield session
