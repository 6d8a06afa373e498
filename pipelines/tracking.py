"""One MLflow run per training run, whatever restarts happen in between.

The driver creates the run, workers get its id, rank 0 logs through `pipelines.metric_log`. MLflow's global tracking
URI is never set: every call goes through a client bound to the configured store. Starting a run needs the store; after
that an outage is a warning, never an error: `log_artifacts` and `finish_run` return whether they were taken.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from mm_core.address import without_password
from mm_core.config import Config, flatten
from mm_core.errors import ServiceError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
FOLDER_TAG = "mm.folder"
"""Of a training run: its folder."""
_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # Standard output belongs to the command, `--json` above all.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_PARAMS_PER_BATCH = 100
_PARAM_CHARS = 6000
_TAG_CHARS = 8000
_DIGEST_CHARS = 36


class TrackingConfig(Config):
    """Where runs and registered models are kept."""

    uri: str = "sqlite:///mlflow.db"
    """An MLflow tracking store: `sqlite:///FILE` on this machine, or a server, `http://HOST:PORT`."""
    artifact_location: str | None = None
    """Where a new experiment keeps its artifacts, a folder or URL. None: `mlartifacts` beside a sqlite file; what the
    server says on a server."""
    experiment: str = Field(default="mm", min_length=1)
    """The MLflow experiment that runs are listed under; created when absent."""
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPU use of rank 0's machine."""
    system_metrics_interval_s: float = Field(default=10.0, gt=0)
    """Seconds between two readings of the machine."""

    @field_validator("uri")
    @classmethod
    def _known_store(cls, uri: str) -> str:
        scheme = uri.split(":", 1)[0].split("+", 1)[0]
        if scheme not in _SCHEMES:
            raise ValueError("not a tracking store; use sqlite:///FILE.db, or http://HOST:PORT of an MLflow server")
        if without_password(uri) != uri:
            raise ValueError(
                "it carries a password, which run folders, checkpoints and MLflow would keep: export MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD for a server, or PGPASSFILE for PostgreSQL"
            )
        if scheme == "sqlite" and (not uri.startswith(_SQLITE) or uri[len(_SQLITE) :].lstrip("/") in ("", ":memory:")):
            raise ValueError("not a sqlite file; use sqlite:///mlflow.db (relative) or sqlite:////data/mlflow.db")
        return uri

    def resolved(self, base: Path | None = None) -> TrackingConfig:
        """The same store with absolute paths, so that processes with another working folder find it."""
        uri = resolve_uri(self.uri, base)
        location = self.artifact_location
        database = sqlite_file(uri)
        if location is None and database is not None:
            location = (database.parent / "mlartifacts").as_uri()
        elif location is not None and "://" not in location:
            location = ((base or Path.cwd()) / location).absolute().as_uri()
        return self.model_copy(update={"uri": uri, "artifact_location": location})


class RunStatus(StrEnum):
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True)
class DatasetInput:
    """An index as MLflow shows it: `digest` is its fingerprint (36 characters are kept), `source` its folder or URL."""

    name: str
    digest: str
    source: str
    samples: int
    context: str = "training"


def resolve_uri(uri: str, base: Path | None = None) -> str:
    """`uri` with a relative sqlite file made absolute against `base` (default: the working folder)."""
    if not uri.startswith(_SQLITE):
        return uri
    path, question, query = uri[len(_SQLITE) :].partition("?")
    return f"{_SQLITE}{os.path.abspath((base or Path.cwd()) / path)}{question}{query}"


def sqlite_file(uri: str) -> Path | None:
    """The database file behind a sqlite URI, None for any other store."""
    return Path(uri[len(_SQLITE) :].partition("?")[0]) if uri.startswith(_SQLITE) else None


def outage(uri: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """Why a tracking server does not answer now, or None. MLflow's own client would retry for minutes."""
    if not uri.startswith(("http://", "https://")):
        return None
    import requests

    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=timeout_s).status_code
    except requests.exceptions.SSLError:
        return None  # It answers; whether its certificate will do is for MLflow's TLS settings to decide.
    except requests.RequestException as error:
        return f"no answer ({type(error).__name__})"
    return f"HTTP status {status}" if status >= 500 else None


def quieten_mlflow() -> None:
    """Set what MLflow reads from the environment, unless it is set; to be called before MLflow's first import."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def open_client(config: TrackingConfig) -> MlflowClient:
    """A client of the configured store; a sqlite store is created on first use.

    Raises:
        ServiceError: the store does not answer or cannot be opened.
    """
    reason = outage(config.uri)
    if reason is not None:
        raise ServiceError(
            f"the tracking server {without_password(config.uri)} gives {reason}; start it, correct tracking.uri, or "
            "keep runs on this machine with --set tracking.uri=sqlite:///mlflow.db"
        )
    uri = resolve_uri(config.uri)
    quieten_mlflow()
    from mlflow import MlflowClient
    from mlflow.utils.logging_utils import suppress_logs_in_thread

    with store_errors(config, "opening"), suppress_logs_in_thread():  # A new sqlite file would print its migrations.
        if (database := sqlite_file(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def store_errors(config: TrackingConfig, doing: str) -> Iterator[None]:
    """What MLflow and its back ends raise inside becomes a ServiceError that names the store and the action."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        yield
    except ImportError as error:  # MLflow loads a database's or a store's library when it is first asked
        raise ServiceError(
            f"{doing} failed in the MLflow store {without_password(config.uri)}: {error}; install that where mm and its workers run, or"
            " name an MLflow server"
        ) from error
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        summary = without_password(str(error).strip().split("\n", 1)[0])
        raise ServiceError(
            f"{doing} failed in the MLflow store {without_password(config.uri)}: {summary}; check tracking.uri "
            "and that the store can be written"
        ) from error


def create_run(
    config: TrackingConfig,
    *,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    datasets: Sequence[DatasetInput] = (),
) -> str:
    """Start the run and return its id: parameters, the whole of `params` as `config.json`, the data as dataset inputs.

    Parameters longer than MLflow takes are cut; passwords in URLs are masked in both places.

    Raises:
        ServiceError: the store does not answer or refuses.
    """
    config = config.resolved()
    client = open_client(config)
    with store_errors(config, f"creating run {run_name!r}"):
        experiment_id = _experiment(client, config)
        run_id: str = client.create_run(experiment_id, run_name=run_name, tags=_cut_tags(tags or {})).info.run_id
        try:
            _log_params(client, run_id, params)
            if datasets:
                client.log_inputs(run_id, datasets=[_mlflow_dataset(d) for d in datasets])
        except BaseException:
            client.set_terminated(run_id, RunStatus.FAILED)
            raise
    return run_id


_NO_SUCH_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What a store answers of a run it has not, or that was deleted."""


def continue_run(config: TrackingConfig, run_id: str) -> None:
    """Mark an earlier run as running again. A store that is down is only warned about: metrics are spooled meanwhile.

    Raises:
        ServiceError: the store answers but has no such run.
    """
    try:
        client = open_client(config)
    except ServiceError as error:
        log.warning("run %s goes on, but is not marked as running: %s", run_id, error)
        return
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code not in _NO_SUCH_RUN:
            log.warning("run %s goes on, but is not marked as running: %s", run_id, without_password(error.message.split("\n", 1)[0]))
            return
        raise ServiceError(
            f"run {run_id} cannot be continued in {without_password(config.uri)}: {error.message}; set tracking.uri to "
            "the store that the run was started in"
        ) from None


def finish_run(config: TrackingConfig, run_id: str, status: RunStatus) -> bool:
    """Set the run's final status. False, and a warning, when the store does not take it."""
    try:
        client = open_client(config)
        with store_errors(config, f"setting the status of run {run_id}"):
            client.set_terminated(run_id, status)
    except ServiceError as error:
        log.warning("the run's status %s was not stored: %s", status, error)
        return False
    return True


def end_runs_of(config: TrackingConfig, run_name: str, folder: str) -> None:
    """Mark as killed what an earlier start of a run made, and did not live to use. A store that is down is only warned about."""
    try:
        client = open_client(config)
        with store_errors(config, f"looking for what an earlier start of {run_name!r} left"):
            running = f"attributes.run_name = '{run_name}' and attributes.status = 'RUNNING'"
            for run in client.search_runs([_experiment(client, config)], running):
                if run.data.tags.get(FOLDER_TAG) == folder:
                    client.set_terminated(run.info.run_id, RunStatus.KILLED)
    except ServiceError as error:
        log.warning("%s", error)


def log_artifacts(config: TrackingConfig, run_id: str, path: Path, artifact_path: str | None = None) -> bool:
    """Upload a file, or a folder's content, below `artifact_path`. False, and a warning, when the store refuses."""
    try:
        client = open_client(config)
        with store_errors(config, f"uploading {path}"):
            upload = client.log_artifacts if path.is_dir() else client.log_artifact
            upload(run_id, str(path), artifact_path)
    except ServiceError as error:
        log.warning("artifacts were not uploaded, they are still in %s: %s", path, error)
        return False
    return True


def log_metrics(config: TrackingConfig, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> bool:
    """Metrics of a finished run, as those of its evaluation. False, and a warning, when the store refuses."""
    try:
        client = open_client(config)
        with store_errors(config, f"logging metrics of run {run_id}"):
            for name, value in metrics.items():
                client.log_metric(run_id, metric_name(name), float(value), step=step)
    except ServiceError as error:
        log.warning("metrics were not logged: %s", error)
        return False
    return True


def log_tags(config: TrackingConfig, run_id: str, tags: Mapping[str, str]) -> bool:
    """Set tags of a run. False, and a warning, when the store refuses."""
    try:
        client = open_client(config)
        with store_errors(config, f"tagging run {run_id}"):
            for name, value in _cut_tags(tags).items():
                client.set_tag(run_id, name, value)
    except ServiceError as error:
        log.warning("tags were not stored: %s", error)
        return False
    return True


def has_run(config: TrackingConfig, run_id: str) -> bool:
    """Whether the store has the run; a local store that is not there is not made."""
    database = sqlite_file(resolve_uri(config.uri))
    if database is not None and not database.exists():
        return False
    try:
        client = open_client(config)
        with store_errors(config, f"looking up run {run_id}"):
            client.get_run(run_id)
    except ServiceError:
        return False
    return True


def run_status(config: TrackingConfig, run_id: str) -> str | None:
    """RUNNING, or a `RunStatus`. None where the store does not say."""
    try:
        client = open_client(config)
        with store_errors(config, f"looking up run {run_id}"):
            return str(client.get_run(run_id).info.status)
    except ServiceError:
        return None


def final_metrics(config: TrackingConfig, run_id: str, prefix: str) -> dict[str, float]:
    """The last value of every metric of a run whose name starts with `prefix`, which is left out; {} for an unknown run, or where the
    store does not answer."""
    try:
        client = open_client(config)
        with store_errors(config, f"reading the metrics of run {run_id}"):
            found: dict[str, float] = client.get_run(run_id).data.metrics
    except ServiceError:
        return {}
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def metric_history(config: TrackingConfig, run_id: str, names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by step for each metric of `names` that the run has; a replayed step counts with its last value.

    Empty, and a warning, when the store does not answer.
    """
    history: dict[str, list[tuple[int, float]]] = {}
    try:
        client = open_client(config)
        with store_errors(config, f"reading the metrics of run {run_id}"):
            for name in names:
                points = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
                if points:
                    history[name] = sorted({metric.step: metric.value for metric in points}.items())
    except ServiceError as error:
        log.warning("the run's metrics cannot be read now: %s", error)
    return history


def last_step(config: TrackingConfig, run_id: str) -> int:
    """Of training, as its loss was logged: what is measured of the finished model counts as the latest only from there on."""
    return metric_history(config, run_id, ["loss"]).get("loss", [(0, 0.0)])[-1][0]


def describe_run(config: TrackingConfig, run_id: str) -> str:
    """How a person opens the run: a server's address, or the command that shows a local store."""
    page = ""
    try:
        client = open_client(config)
        with store_errors(config, f"looking up run {run_id}"):
            page = f"#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    except ServiceError as error:
        log.warning("the run cannot be looked up now: %s", error)
    if config.uri.startswith(("http://", "https://")):
        return f"{without_password(config.uri).rstrip('/')}/{page}"
    store = shlex.quote(without_password(resolve_uri(config.uri)))
    return f"mlflow ui --backend-store-uri {store}   then open http://127.0.0.1:5000/{page}"


def _experiment(client: MlflowClient, config: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(config.experiment)
    if found is None:
        try:
            return client.create_experiment(config.experiment, artifact_location=config.artifact_location)
        except MlflowException as error:
            found = client.get_experiment_by_name(config.experiment)  # Another driver may have been first.
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ServiceError(
            f"the experiment {config.experiment!r} is deleted; choose another with tracking.experiment, or restore it: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    experiment_id: str = found.experiment_id
    return experiment_id


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    text = without_password(json.dumps(params, indent=2, default=str))
    entries = [Param(metric_name(key), _cut(value)) for key, value in flatten(params)]
    for start in range(0, len(entries), _PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entries[start : start + _PARAMS_PER_BATCH])
    client.log_text(run_id, text, "config.json")


def _cut(value: Any, limit: int = _PARAM_CHARS) -> str:
    text = without_password(str(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _cut_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _cut(value, _TAG_CHARS) for key, value in tags.items()}


def metric_name(key: str) -> str:
    """`key` in the characters and length that MLflow takes for parameters and metrics."""
    return posixpath.normpath(re.sub(r"[^\w.\- :/]", "_", key)[:250]).lstrip("./") or "_"


def _mlflow_dataset(data: DatasetInput) -> Any:
    from mlflow.entities import Dataset, InputTag
    from mlflow.entities import DatasetInput as MlflowDatasetInput

    dataset = Dataset(
        name=data.name,
        digest=data.digest[:_DIGEST_CHARS],
        source_type="local" if "://" not in data.source else data.source.split("://", 1)[0],
        source=json.dumps({"uri": without_password(data.source)}),
        profile=json.dumps({"num_rows": data.samples}),
    )
    return MlflowDatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])
