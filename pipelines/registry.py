"""The model registry: bundles as MLflow model versions, found again by alias or number.

A version points at a bundle among a run's artifacts and carries its SHA-256, data fingerprint, recipe and metrics as
tags. What `resolve_model` returns was compared with that digest; nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm_core.address import absolute
from mm_core.bundle import MANIFEST, BundleManifest, read_manifest
from mm_core.bundle_cache import bundle_at, bundle_digest, holds, keep_bundle
from mm_core.cache import cache_folder
from mm_core.config import nearest
from mm_core.errors import BundleError, ConfigError, ServiceError
from pipelines.tracking import RunStatus, TrackingConfig, create_run, finish_run, open_client, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.entities.model_registry import RegisteredModel as MlflowModel

log = logging.getLogger(__name__)

ARTIFACT = "bundle"
"""Where a run keeps its bundle among its artifacts."""
DIGEST_TAG = "bundle_sha256"
"""SHA-256 of the manifest, which holds those of all other files."""
_NAME = re.compile(r"\w[\w.\-]{0,99}")
_ALIAS = re.compile(r"(?!latest$|[vV]?\d+$)[\w\-]{1,100}")
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class RegisteredModel:
    name: str
    version: int
    alias: str | None

    @property
    def reference(self) -> str:
        """What commands that take a model accept."""
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"


def register_bundle(
    tracking: TrackingConfig,
    *,
    name: str,
    bundle_folder: Path,
    run_id: str | None = None,
    alias: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> RegisteredModel:
    """Make the bundle the next version of `name`, and let `alias` point at it.

    It belongs to `run_id`, else to the run it was trained in where this store has that, else to one made for it; it is
    uploaded unless that run already holds it. `metrics` become tags beside those of the bundle.

    Raises:
        ConfigError: a name or alias that MLflow or a reference could not carry.
        BundleError: the folder is not a whole bundle.
        ServiceError: the store does not answer or refuses.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a model; use up to 100 letters, digits, '_', '-' or '.'")
    if alias is not None and not _ALIAS.fullmatch(alias):
        raise ConfigError(f"{alias!r} cannot be an alias; use letters, digits, '_', '-'; not 'latest' or a number")
    manifest = read_manifest(bundle_folder, verify=True)
    tracking = tracking.resolved()
    client = open_client(tracking)
    trained_in = run_id or _existing_run(client, manifest.run_id)
    owner = trained_in or create_run(tracking, run_name=f"register {name}", params={}, tags={"kind": "registration"})
    status = RunStatus.FAILED
    try:
        with store_errors(tracking, f"registering {bundle_folder} as {name!r}"):
            tags = _tags(manifest, bundle_digest(bundle_folder), metrics or {})
            version = _create_version(client, name, bundle_folder, owner, tags)
            if alias is not None:
                client.set_registered_model_alias(name, alias, str(version))
        status = RunStatus.FINISHED
    finally:
        if trained_in is None:
            finish_run(tracking, owner, status)
    return RegisteredModel(name, version, alias)


def resolve_model(reference: str, tracking: TrackingConfig) -> Path | str:
    """The local folder of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a URL; any other reference as it came.

    Versions are kept under `models/` in `$MM_CACHE` (default `~/.cache/mm`); one damaged there is fetched again. One that is there is
    taken also where the store does not answer.

    Raises:
        ConfigError: not a models reference, though it starts like one.
        BundleError: no such model, alias or version (what exists is named), or its files are not those registered.
        ServiceError: the store does not answer.
    """
    if "://" in reference:
        return bundle_at(reference)
    if not reference.startswith("models:"):
        return reference
    name, alias, number = _parts(reference)
    try:
        client = open_client(tracking)
        with store_errors(tracking, f"looking up {reference}"):
            version = _find(client, name, alias, number)
            source = client.get_model_version_download_uri(version.name, version.version)
    except ServiceError as error:
        if number is None or (kept := _kept(name, number)) is None:
            raise
        log.warning("%s is taken from %s, where it was kept: %s", reference, kept, error)
        return kept
    digest = version.tags.get(DIGEST_TAG)
    if digest is None or not _NAME.fullmatch(version.name):
        raise BundleError(f"{reference} was not registered with `mm register`, so it cannot be checked; pass a downloaded folder")
    folder = cache_folder() / "models" / version.name / f"{version.version}-{digest[:16]}"

    def fetch(target: Path) -> Path:
        import mlflow.artifacts

        return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking.resolved().uri))

    with store_errors(tracking, f"downloading {reference}"):
        return keep_bundle(folder, digest, source, fetch)


def _kept(name: str, number: str) -> Path | None:
    """A version that was fetched before, as it was: what a number stands for does not change."""
    folders = (cache_folder() / "models" / name).glob(f"{number}-*")
    return next((folder for folder in folders if holds(folder, folder.name.partition("-")[2])), None)


def pin(reference: str, tracking: TrackingConfig) -> str:
    """The reference that means the same tomorrow: `models:/NAME/VERSION` of an alias, a folder from the root, else as it came.

    Raises:
        ConfigError, BundleError, ServiceError: as `resolve_model`.
    """
    if not reference.startswith("models:"):
        return absolute(reference) if Path(reference).is_dir() else reference
    with store_errors(tracking, f"looking up {reference}"):
        version = _find(open_client(tracking), *_parts(reference))
    return f"models:/{version.name}/{version.version}"


@dataclass(frozen=True)
class RegistryModels:
    """Models as serving asks for them, in whichever process."""

    tracking: TrackingConfig

    def pin(self, reference: str) -> str:
        return pin(reference, self.tracking)

    def fetch(self, reference: str) -> str:
        found = str(resolve_model(reference, self.tracking))
        return absolute(found) if Path(found).is_dir() else found


def _parts(reference: str) -> tuple[str, str | None, str | None]:
    """Name, alias and version."""
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise ConfigError(f"{reference!r} is not a model reference; use models:/NAME@ALIAS or models:/NAME/VERSION")
    return parts["name"], parts["alias"], parts["version"]


def _existing_run(client: MlflowClient, run_id: str | None) -> str | None:
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return client.get_run(run_id).info.run_id
    except MlflowException:
        return None


def _create_version(client: MlflowClient, name: str, folder: Path, run_id: str, tags: dict[str, str]) -> int:
    source = f"{client.get_run(run_id).info.artifact_uri}/{_upload(client, run_id, folder)}"
    _create_model(client, name)
    return int(client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=0).version)


def _upload(client: MlflowClient, run_id: str, folder: Path) -> str:
    """The artifact path of this very bundle in the run, uploaded unless it is there."""
    for path in (ARTIFACT, f"{ARTIFACT}-{bundle_digest(folder)[:16]}"):
        held = _artifact_sizes(client, run_id, path)
        if held and (held != _file_sizes(folder) or _artifact_digest(client, run_id, path) != bundle_digest(folder)):
            continue  # Another bundle of this run.
        if not held:
            client.log_artifacts(run_id, str(folder), path)
        return path
    client.log_artifacts(run_id, str(folder), path)  # An upload that was cut short.
    return path


def _artifact_sizes(client: MlflowClient, run_id: str, path: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    folders = [path]
    while folders:
        for entry in client.list_artifacts(run_id, folders.pop()):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                sizes[entry.path.removeprefix(f"{path}/")] = int(entry.file_size or 0)
    return sizes


def _file_sizes(folder: Path) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def _artifact_digest(client: MlflowClient, run_id: str, path: str) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        return bundle_digest(Path(client.download_artifacts(run_id, f"{path}/{MANIFEST}", temporary)).parent)


def _tags(manifest: BundleManifest, digest: str, metrics: Mapping[str, float]) -> dict[str, str]:
    return {
        DIGEST_TAG: digest,
        "data_fingerprint": manifest.data_fingerprint,
        "recipe": manifest.recipe,
        "task": manifest.task,
        **{f"metric.{name}": f"{value:.6g}" for name, value in {**manifest.metrics, **metrics}.items()},
    }


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: MlflowClient, name: str, alias: str | None, version: str | None) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        model: MlflowModel = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in client.search_registered_models(max_results=100)]
        hint = nearest(name, known) if known else "; none is registered there yet: mm register BUNDLE --name NAME"
        raise BundleError(f"no registered model {name!r}{hint}") from None
    wanted = version or model.aliases.get(alias)
    try:
        if wanted is not None:
            return client.get_model_version(name, str(wanted))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    aliases = ", ".join(f"@{known} (version {number})" for known, number in sorted(model.aliases.items())) or "none"
    numbers = [int(v.version) for v in client.search_model_versions(f"name='{name}'", max_results=100)]
    versions = ", ".join(map(str, sorted(numbers))) or "none"
    missing = f"alias {alias!r}" if alias else f"version {version}"
    raise BundleError(f"model {name!r} has no {missing}; its aliases: {aliases}; its versions: {versions}")
