"""A tiny bundle and one endpoint over it, shared by the tests of this folder: deploying costs more than all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mm_core.bundle import Bundle, load_bundle, write_bundle
from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from mm_core.ports import free_port
from pipelines.embed import embed
from pipelines.registry import RegistryModels, register_bundle
from pipelines.search_index import SearchOptions, make_searchable
from pipelines.tracking import TrackingConfig, open_client
from serve.cli import wanted_models
from serve.config import Bound, Compute, LabelSet, ServeConfig
from serve.run import Server, look_at, start


def make_bundle(folder: Path, seed: int, *, spoil: Callable[[torch.nn.Module], None] = lambda model: None) -> Path:
    """A tiny model with weights of its own."""
    torch.manual_seed(seed)
    tokenizer = train_bpe(["a red circle", "two blue squares"], vocab_size=300, context_length=16)
    tower = TowerConfig(width=32, layers=1, heads=2)
    config = ClipConfig(image_size=32, patch_size=16, context_length=16, vocab_size=len(tokenizer), embed_dim=16, vision=tower, text=tower)
    model = build_clip(config, special_tokens(tokenizer))
    spoil(model)
    write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe="clip-tiny", data_fingerprint="f1" * 16, metrics={})
    return folder


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("served") / "tiny", 0)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> RegistryModels:
    folder = tmp_path_factory.mktemp("registry")
    return RegistryModels(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifact_location=f"{folder}/artifacts").resolved())


@pytest.fixture(scope="package")
def searchable(
    ray_cluster: None, bundle_folder: Path, registry: RegistryModels, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What is held out of the corpus, embedded by version 1."""
    register_bundle(registry.tracking, name="tiny", bundle_folder=bundle_folder, alias="champion")
    open_client(registry.tracking).set_registered_model_alias("tiny", "challenger", "1")
    folder = tmp_path_factory.mktemp("searchable") / "vectors"
    embed(registry.fetch("models:/tiny/1"), "models:/tiny/1", [str(corpus / "heldout")], folder, actors=1)
    make_searchable(folder, SearchOptions())
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder)


@pytest.fixture(scope="package")
def serve_config(searchable: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """Small bounds, so that breaking them is cheap; one preparer, so that a process that is gone has died."""
    bounds = Bound(
        max_requests=8,
        max_inputs=12,
        max_text_characters=200,
        max_image_bytes=50_000,
        max_pixels=1_000_000,
        max_request_bytes=1_000_000,
    )
    shapes = LabelSet(labels=("red circle", "blue square", "star"), templates=("a {c}", "a picture of a {c}."))
    return ServeConfig(
        port=free_port(),
        compute=Compute(max_batch_size=4, max_preparers=1),
        bounds=bounds,
        label_sets={"shapes": shapes},
        search=str(searchable),
        follow_interval_s=0.5,
        log_folder=str(tmp_path_factory.mktemp("requests")),
    )


@pytest.fixture(scope="package")
def server(serve_config: ServeConfig, registry: RegistryModels) -> Iterator[Server]:
    """An alias that is followed, with a canary beside it, which at first is the same version."""
    wanted = wanted_models(["tiny=models:/tiny@champion"], ["models:/tiny@challenger=30"])
    running = start(look_at(wanted, serve_config, registry))
    yield running
    running.stop()


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as session:
        yield session


PATIENCE_S = 300
"""A version comes up in seconds; on a machine that does much else, in minutes."""


@pytest.fixture
def point(registry: RegistryModels, client: httpx.Client) -> Iterator[Callable[[str, int], None]]:
    """Point an alias at a version; at the end both point at version 1 again, which answers."""

    def to(alias: str, version: int) -> None:
        open_client(registry.tracking).set_registered_model_alias("tiny", alias, str(version))

    yield to
    to("champion", 1)
    to("challenger", 1)
    wait(client, lambda state: state["answers"] == {"models:/tiny/1": 100.0} and state["refused"] is None)


def register(registry: RegistryModels, folder: Path) -> int:
    return register_bundle(registry.tracking, name="tiny", bundle_folder=folder).version


def wait(client: httpx.Client, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The model's state, once it is as wanted. All the while something answers."""
    end = time.monotonic() + PATIENCE_S
    while True:
        answer = client.get("/readyz")
        assert answer.status_code == 200, answer.text
        (state,) = answer.json()["models"]
        if wanted(state):
            return state
        assert time.monotonic() < end, state
        time.sleep(0.2)
