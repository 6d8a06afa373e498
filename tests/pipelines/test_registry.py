"""Bundles registered in a real sqlite MLflow, then found, checked and fetched again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import CLIPModel

from mm_core.bundle import load_bundle, write_bundle
from mm_core.errors import BundleError, ConfigError, ServiceError
from mm_core.models.clip import ClipConfig, build_clip
from mm_core.models.sizes import TowerConfig
from mm_core.models.tokenizer import special_tokens, train_bpe
from pipelines.registry import RegisteredModel, register_bundle, resolve_model
from pipelines.tracking import TrackingConfig, create_run, log_artifacts, open_client


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_bpe(["a red circle", "two blue squares"], vocab_size=300, context_length=16)
    tower = TowerConfig(width=32, layers=1, heads=2)
    config = ClipConfig(
        image_size=32,
        patch_size=16,
        context_length=16,
        vocab_size=len(tokenizer),
        embed_dim=16,
        vision=tower,
        text=tower,
    )
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    write_bundle(
        folder,
        model=build_clip(config, special_tokens(tokenizer)),
        tokenizer=tokenizer,
        config=config,
        recipe="clip-tiny",
        data_fingerprint="f1" * 16,
        metrics={"t2i_r1": 0.25, "top1": 1 / 3},
        run_id=None,
    )
    return folder


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(TrackingConfig(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "bundle"))


@pytest.fixture
def tracking(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingConfig:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db").resolved()


def artifacts(tracking: TrackingConfig, run_id: str) -> list[str]:
    return sorted(entry.path for entry in open_client(tracking).list_artifacts(run_id))


def test_a_registered_bundle_is_found_by_alias_and_by_number(tracking: TrackingConfig, bundle: Path, tmp_path: Path) -> None:
    registered = register_bundle(tracking, name="clip-demo", bundle_folder=bundle, alias="champion")
    assert registered == RegisteredModel("clip-demo", 1, "champion")
    assert registered.reference == "models:/clip-demo@champion"

    version = open_client(tracking).get_model_version_by_alias("clip-demo", "champion")
    assert version.tags["data_fingerprint"] == "f1" * 16
    assert version.tags["recipe"] == "clip-tiny"
    assert version.tags["task"] == "contrastive"
    assert version.tags["metric.t2i_r1"] == "0.25"
    assert version.tags["metric.top1"] == "0.333333"
    assert version.run_id is not None
    run = open_client(tracking).get_run(version.run_id)
    assert (run.data.tags["kind"], run.info.status) == ("registration", "FINISHED")

    by_alias = resolve_model("models:/clip-demo@champion", tracking)
    assert resolve_model("models:/clip-demo/1", tracking) == by_alias
    assert isinstance(by_alias, Path)
    assert by_alias.is_relative_to(tmp_path / "cache" / "models" / "clip-demo")
    assert load_bundle(by_alias).embed_dim == 16
    CLIPModel.from_pretrained(by_alias)


def test_an_alias_moves_to_the_next_version(tracking: TrackingConfig, bundle: Path) -> None:
    register_bundle(tracking, name="clip", bundle_folder=bundle, alias="champion")
    first = resolve_model("models:/clip@champion", tracking)
    assert register_bundle(tracking, name="clip", bundle_folder=bundle, alias="champion").version == 2
    second = resolve_model("models:/clip@champion", tracking)
    assert isinstance(first, Path)
    assert isinstance(second, Path)
    assert second.name.startswith("2-")
    assert resolve_model("models:/clip/1", tracking) == first


def test_the_bundle_that_the_run_holds_is_not_uploaded_again(tracking: TrackingConfig, bundle: Path) -> None:
    run_id = create_run(tracking, run_name="train", params={})
    log_artifacts(tracking, run_id, bundle, "bundle")
    register_bundle(tracking, name="clip", bundle_folder=bundle, run_id=run_id)
    assert artifacts(tracking, run_id) == ["bundle", "config.json"]
    assert open_client(tracking).get_run(run_id).info.status == "RUNNING"
    assert isinstance(resolve_model("models:/clip/1", tracking), Path)


def test_a_bundle_belongs_to_the_run_it_was_trained_in(tracking: TrackingConfig, bundle: Path) -> None:
    run_id = create_run(tracking, run_name="train", params={})
    manifest = json.loads((bundle / "mm.json").read_text())
    (bundle / "mm.json").write_text(json.dumps(manifest | {"run_id": run_id}))
    register_bundle(tracking, name="clip", bundle_folder=bundle, metrics={"t2i_r1": 0.5, "i2t_r1": 0.75})
    version = open_client(tracking).get_model_version("clip", "1")
    assert version.run_id == run_id
    assert (version.tags["metric.t2i_r1"], version.tags["metric.i2t_r1"]) == ("0.5", "0.75")
    assert artifacts(tracking, run_id) == ["bundle", "config.json"]


def test_another_bundle_of_the_run_and_a_cut_upload_do_not_get_in_the_way(tracking: TrackingConfig, bundle: Path, tmp_path: Path) -> None:
    run_id = create_run(tracking, run_name="train", params={})
    (tmp_path / "cut").mkdir()
    shutil.copy(bundle / "mm.json", tmp_path / "cut")
    log_artifacts(tracking, run_id, tmp_path / "cut", "bundle")
    register_bundle(tracking, name="clip", bundle_folder=bundle, run_id=run_id)
    assert len(artifacts(tracking, run_id)) == 3
    assert isinstance(resolve_model("models:/clip/1", tracking), Path)


def test_a_damaged_copy_in_the_cache_is_fetched_again(tracking: TrackingConfig, bundle: Path) -> None:
    register_bundle(tracking, name="clip", bundle_folder=bundle)
    folder = resolve_model("models:/clip/1", tracking)
    assert isinstance(folder, Path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert resolve_model("models:/clip/1", tracking) == folder
    load_bundle(folder)
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_version_that_is_kept_is_had_where_the_store_does_not_answer(tracking: TrackingConfig, bundle: Path) -> None:
    """As by a copy of an endpoint's model that is started in place of one that died."""
    register_bundle(tracking, name="clip", bundle_folder=bundle, alias="champion")
    folder = resolve_model("models:/clip/1", tracking)
    away = TrackingConfig(uri="http://127.0.0.1:9")
    assert resolve_model("models:/clip/1", away) == folder
    with pytest.raises(ServiceError):
        resolve_model("models:/clip@champion", away)  # it may be another one by now
    assert isinstance(folder, Path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ServiceError):
        resolve_model("models:/clip/1", away)


@pytest.mark.parametrize("damaged", ["mm.json", "model.safetensors"])
def test_a_stored_bundle_that_was_changed_is_refused(damaged: str, tracking: TrackingConfig, bundle: Path, tmp_path: Path) -> None:
    register_bundle(tracking, name="clip", bundle_folder=bundle)
    (stored,) = tmp_path.glob(f"mlartifacts/*/artifacts/bundle/{damaged}")
    stored.write_bytes(stored.read_bytes().replace(b"a", b"b"))
    with pytest.raises(BundleError):
        resolve_model("models:/clip/1", tracking)
    assert not list((tmp_path / "cache/models/clip").iterdir())


def test_a_damaged_bundle_is_not_registered(tracking: TrackingConfig, bundle: Path) -> None:
    (bundle / "config.json").write_text("{}")
    with pytest.raises(BundleError):
        register_bundle(tracking, name="clip", bundle_folder=bundle)
    assert not open_client(tracking).search_registered_models()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/clip-demp@champion", r"no registered model 'clip-demp'; did you mean 'clip-demo'\?"),
        ("models:/zzz/1", r"no registered model 'zzz'; known: clip-demo"),
        ("models:/clip-demo@best", r"no alias 'best'; its aliases: @champion \(version 2\); its versions: 1, 2"),
        ("models:/clip-demo/7", r"no version 7; its aliases: @champion \(version 2\); its versions: 1, 2"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(reference: str, message: str, tracking: TrackingConfig, bundle: Path) -> None:
    for alias in (None, "champion"):
        register_bundle(tracking, name="clip-demo", bundle_folder=bundle, alias=alias)
    with pytest.raises(BundleError, match=message):
        resolve_model(reference, tracking)


def test_an_empty_registry_says_how_to_fill_it(tracking: TrackingConfig) -> None:
    with pytest.raises(BundleError, match="none is registered there yet: mm register"):
        resolve_model("models:/clip@champion", tracking)


@pytest.mark.parametrize("reference", ["models:/clip", "models:/clip/latest", "models:/a/../b/1", "models:"])
def test_a_malformed_reference_is_wrong_use(reference: str, tracking: TrackingConfig) -> None:
    with pytest.raises(ConfigError, match="use models:/NAME@ALIAS or models:/NAME/VERSION"):
        resolve_model(reference, tracking)


@pytest.mark.parametrize("reference", ["runs/bundle", "/data/bundle", "openai/clip-vit-base-patch32"])
def test_folders_and_hub_ids_are_left_alone(reference: str) -> None:
    assert resolve_model(reference, TrackingConfig(uri="http://127.0.0.1:1")) == reference


def test_a_version_of_another_tool_is_refused(tracking: TrackingConfig, bundle: Path) -> None:
    client = open_client(tracking)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=bundle.as_uri())
    with pytest.raises(BundleError, match="was not registered with `mm register`"):
        resolve_model("models:/foreign/1", tracking)


@pytest.mark.parametrize(("name", "alias"), [("a/b", None), ("", None), ("..", None), ("clip", "latest"), ("clip", "v2")])
def test_a_name_no_reference_could_carry_is_wrong_use(name: str, alias: str | None, tracking: TrackingConfig, bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot (name a model|be an alias)"):
        register_bundle(tracking, name=name, bundle_folder=bundle, alias=alias)


def test_a_run_that_does_not_exist_is_named(tracking: TrackingConfig, bundle: Path) -> None:
    with pytest.raises(ServiceError, match="feedbeef"):
        register_bundle(tracking, name="clip", bundle_folder=bundle, run_id="feedbeef")
