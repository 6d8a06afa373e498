"""Checks of what is reached over the network or configured for it. Credentials are looked for, never read or shown."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from urllib.parse import urlsplit

from packaging.version import InvalidVersion, Version

from cluster.check import Check, fail, ok, warn
from cluster.machine import FLOORS
from cluster.needs import Needs
from mm_core.address import without_password
from mm_core.store import open_store, reaching

_TIMEOUT_S, _STORE_TIMEOUT_S = 3.0, 20.0
_PORTS = {
    8000: ("mm serve", "serve on another one: mm serve MODEL --port 8001"),
    8265: ("a Ray head's job service", "if it is not your head: ray start --head --dashboard-port 8266"),
    5000: ("an MLflow server", "if it is not yours: mlflow server --port 5001"),
}
_DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433, "ray": 10001}


def ports() -> list[Check]:
    """The ports that commands use unless told otherwise."""
    found = []
    for port, (use, remedy) in _PORTS.items():
        if _listens("127.0.0.1", port):
            found.append(warn(f"port {port}", f"in use; {use} would listen here", remedy))
        else:
            found.append(ok(f"port {port}", "free"))
    return found


def ray_authentication() -> Check:
    """Whether Ray asks for a token, and whether there is one. Only that a token exists is looked at."""
    name, mode = "Ray authentication", os.environ.get("RAY_AUTH_MODE", "").lower()
    file = _token_file()
    present = bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
    if mode in ("", "token") and file.is_file() and file.stat().st_mode & 0o077:
        return warn(name, f"whoever uses this machine can read the token in {file}, as Ray writes it", f"chmod 600 {file}")
    match mode:
        case "disabled":
            return warn(name, "RAY_AUTH_MODE=disabled: whoever reaches the head runs code on it", "unset RAY_AUTH_MODE, or set it to token")
        case "token" if not present:
            return fail(name, "RAY_AUTH_MODE=token, but there is no token", "run `ray get-auth-token --generate`, or copy the head's token")
        case "token":
            return ok(name, "token; it does not encrypt (RAY_USE_TLS=1 does)")
        case "" if present:
            return ok(name, "a token is there, so Ray asks for it")
        case "":
            remedy = "run `ray get-auth-token --generate` before `ray start --head`, which otherwise starts an open cluster"
            return warn(name, "no token yet: an embedded Ray makes one, `ray start` does not", remedy)
    return fail(name, f"RAY_AUTH_MODE={mode} is no mode", "set it to token")


def ray_head() -> Check:
    """The cluster that RAY_ADDRESS names."""
    name, address = "Ray head", os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return ok(name, "RAY_ADDRESS is not set: each command starts Ray on this machine")
    if address == "auto":
        return warn(name, "RAY_ADDRESS=auto: whichever Ray runs on this machine", "name the head: RAY_ADDRESS=HOST:6379")
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    try:
        host, port = parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        host, port = None, None
    if not host or not port:
        return fail(name, f"RAY_ADDRESS={address} names no host and port", "give HOST:6379, ray://HOST:10001 or http://HOST:8265")
    address = address.rpartition("@")[2]
    if not _listens(host, port):
        return fail(name, f"nothing answers at RAY_ADDRESS={address}", "start it with `ray start --head`, correct RAY_ADDRESS, or unset it")
    if parts.scheme in ("http", "https"):
        return warn(name, f"{address} answers `mm submit` and `mm jobs`; other commands do not start", "unset RAY_ADDRESS for them")
    return ok(name, f"{address} answers")


def tracking(uri: str) -> Check:
    """The store of runs and models: a writable place for sqlite, a server that answers for others."""
    name = "tracking store"
    if without_password(uri) != uri:
        remedy = "take it out, and export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSFILE for PostgreSQL"
        return fail(name, f"tracking.uri={without_password(uri)} carries a password, which runs would keep", remedy)
    if uri.startswith("sqlite:///"):
        return _sqlite(name, Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute())
    parts = urlsplit(uri)
    scheme, shown = parts.scheme.partition("+")[0], f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    if scheme in ("http", "https"):
        reason = _no_answer(f"{uri.rstrip('/')}/health")
        if reason is None:
            return _let_in(name, uri.rstrip("/"), shown)
    elif parts.hostname:
        if (missing := _missing_driver(uri)) is not None:
            remedy = "install it where mm and its workers run (psycopg2-binary for postgresql+psycopg2://), or name an MLflow server"
            return fail(name, f"{shown}: its driver is not there ({missing})", remedy)
        reason = None if _listens(parts.hostname, parts.port or _DEFAULT_PORTS.get(scheme, 0)) else "no answer"
    else:
        reason, shown = "not a tracking store", uri.partition(":")[0]
    if reason:
        remedy = "start it with `mlflow server`, correct tracking.uri (MM_SET__TRACKING__URI), or leave it out: sqlite:///mlflow.db"
        return fail(name, f"{shown}: {reason}", remedy)
    return ok(name, f"{shown} answers")


def _missing_driver(uri: str) -> str | None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except (ImportError, NoSuchModuleError, ArgumentError) as error:
        return str(error)
    return None


def _let_in(name: str, uri: str, shown: str) -> Check:
    """Whether an MLflow server that is up takes this machine's requests: its `/health` answers whom it refuses all else."""
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    who = get_default_host_creds(uri)  # as MLflow itself finds them: variables, its file, certificates
    ask = partial(http_request, who, method="GET", max_retries=0, timeout=_TIMEOUT_S, raise_on_status=False)
    try:
        version, answer = ask("/version").text.strip(), ask("/api/2.0/mlflow/experiments/search", params={"max_results": 1})
    except (MlflowException, requests.RequestException) as error:
        return fail(name, f"{shown}: no answer ({type(error).__name__})", "look at the server's log")
    if answer.status_code == 403 and "host" in answer.text.lower():
        remedy = f"start the server with --allowed-hosts {urlsplit(uri).netloc.rpartition('@')[2]} among its options"
        return fail(name, f"{shown} does not know the name it is called by, and refuses every run", remedy)
    if answer.status_code in (401, 403):
        remedy = "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of a user who may"
        return fail(name, f"{shown} refuses these credentials (HTTP status {answer.status_code})", remedy)
    if answer.status_code != 200:
        return fail(name, f"{shown} gives HTTP status {answer.status_code}", "correct tracking.uri, or look at the server's log")
    with suppress(InvalidVersion):
        if Version(version) < Version(FLOORS["mlflow"]):
            remedy = f"raise the server's MLflow to {FLOORS['mlflow']}: before it, it has published flaws"
            return fail(name, f"{shown} answers, with MLflow {version}", remedy)
    return ok(name, f"{shown} answers")


def store(url: str) -> Check:
    """An object store that a command names: whether it answers these credentials. What is not there yet may be what is to be written."""
    name, shown = "object store", without_password(url)
    found = SimpleQueue[Check]()

    def look() -> None:
        try:
            with reaching(url):
                fs, path = open_store(url)
                there = fs.exists(path) if "/" in path.strip("/") else bool(fs.ls(path))  # of a bucket, s3fs takes any error for absence
        except (OSError, ImportError, ValueError) as error:
            found.put(fail(name, f"{shown}: {error}", "correct the address, or give this machine what it needs to reach it"))
        else:
            found.put(ok(name, f"{shown} {'is there' if there else 'answers, and has nothing yet'}"))

    Thread(target=look, daemon=True).start()  # its library tries for minutes
    try:
        return found.get(timeout=_STORE_TIMEOUT_S)
    except Empty:
        return fail(name, f"{shown}: no answer in {_STORE_TIMEOUT_S:g} s", "correct the address, or open the network to it")


def needed(needs: Needs) -> list[Check]:
    """The tracking store and the object stores that a command needs; where nothing is known of it, what is configured."""
    tracked = [] if needs.tracking_uri is None else [tracking(needs.tracking_uri)]
    configured = [] if needs.stores == () else object_storage()
    return [*tracked, *configured, *map(store, needs.stores or ())]


def object_storage() -> list[Check]:
    """Where to find S3 and with whose credentials, if any of that is configured."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    key, secret = (bool(os.environ.get(name)) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    profile = os.environ.get("AWS_PROFILE")
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser().is_file()
    found = []
    if key != secret:
        here, absent = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")[:: 1 if key else -1]
        found.append(fail("S3 credentials", f"{here} is set, {absent} is not", "export both, or neither and AWS_PROFILE"))
    elif key or profile or file:
        source = "variables" if key else f"profile {profile}" if profile else "the credentials file"
        found.append(ok("S3 credentials", f"from {source}"))
    elif endpoint:
        found.append(warn("S3 credentials", "none found", "export AWS_ACCESS_KEY_ID and its secret, unless the machine has a role"))
    else:
        return [ok("S3", "not configured: s3:// data would use the machine's role")]
    if endpoint:
        parts = urlsplit(endpoint)
        reason = _no_answer(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/")
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        remedy = "correct AWS_ENDPOINT_URL, or unset it for AWS itself"
        found.append(fail("S3 endpoint", f"{shown}: {reason}", remedy) if reason else ok("S3 endpoint", f"{shown} answers"))
    return found


def hugging_face() -> Check:
    """Models and tokenizers by hub id need the hub, or a cache; everything else works without."""
    name = "Hugging Face hub"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return ok(name, "HF_HUB_OFFLINE: hub ids come from the cache")
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    reason = _no_answer(url)
    if reason:
        remedy = "use folders in place of hub ids, and export HF_HUB_OFFLINE=1 so that nothing waits for it"
        return warn(name, f"{urlsplit(url).hostname}: {reason}", remedy)
    return ok(name, f"{urlsplit(url).hostname} answers")


def _sqlite(name: str, file: Path) -> Check:
    """Looks at permissions only: opening the store would create it."""
    folder = next(parent for parent in file.parents if parent.exists())
    writable = os.access(file, os.W_OK) if file.exists() else folder == file.parent and os.access(folder, os.W_OK)
    if not writable or file.is_dir():
        evidence = f"{file} cannot be written" if folder == file.parent else f"the folder {file.parent} does not exist"
        return fail(name, evidence, "set MM_SET__TRACKING__URI=sqlite:////FOLDER/mlflow.db to a folder you can write")
    return ok(name, f"{file} {'is there' if file.exists() else 'will be made'}")


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return True
    except (OSError, OverflowError):
        return False


def _no_answer(url: str) -> str | None:
    """Why the server does not answer, or None. Any status below 500 is an answer: it may want credentials."""
    import requests

    try:
        status = requests.head(url, timeout=_TIMEOUT_S, allow_redirects=False).status_code
    except requests.exceptions.SSLError:
        return "its certificate is not trusted here"
    except requests.RequestException as error:
        return f"no answer ({type(error).__name__})"
    return f"HTTP status {status}" if status >= 500 and status != 501 else None
