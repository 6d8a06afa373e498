"""Metrics from rank 0 to MLflow, without ever waiting for MLflow.

Every point goes to a spool file first and is taken from there by a background thread, so an outage only makes the
file longer, and what a killed process left behind is sent by the next one. Each point arrives exactly once: MLflow's
SQL stores identify a point by (run, name, time, step, value), so sending it again changes nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.address import without_password
from mm_core.cache import cache_folder
from mm_core.errors import ServiceError
from pipelines.tracking import (
    TrackingConfig,
    metric_name,
    open_client,
    outage,
    quieten_mlflow,
    sqlite_file,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

POINTS_PER_BATCH = 1000
"""The most that MLflow takes in one request."""
_VALUES_PER_LINE = 100
_READ_BYTES = 256 * 1024
_ROTATE_BYTES = 4 * 1024 * 1024

Point = tuple[str, float, int, int]
"""Name, value, time in ms, step."""


def spool_folder() -> Path:
    """Where this machine's processes keep points that MLflow has not taken yet."""
    return cache_folder() / "spool"


class Spool:
    """A queue of points on disk: JSON lines, appended by one process, taken from the front by one thread of it.

    Each process holds a lock on its own file in `folder`; opening takes over this run's files whose process is gone.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._run_id = folder, run_id
        self._lock = threading.Lock()
        self._head = 0
        self._path, self._fd = self._create()
        for leftover in sorted(folder.glob(f"{run_id}.*.jsonl")):
            if leftover != self._path:
                self._take_over(leftover)

    def append(self, line: bytes) -> None:
        """Raises: OSError when the disk does not take the whole line; then none of it stays."""
        with self._lock:
            size = os.fstat(self._fd).st_size
            if os.write(self._fd, line) < len(line):
                os.ftruncate(self._fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def unsent(self) -> bytes:
        """Whole lines, all that are left."""
        with self._lock:
            return os.pread(self._fd, os.fstat(self._fd).st_size - self._head, self._head)

    def read(self) -> tuple[list[Point], int]:
        """The oldest points, at most one batch, and how many bytes they take."""
        chunk = os.pread(self._fd, _READ_BYTES, self._head)
        lines = chunk[: chunk.rfind(b"\n") + 1].splitlines(keepends=True)
        if not lines and len(chunk) == _READ_BYTES:
            return [], _READ_BYTES  # Not ours: no line is that long.
        points: list[Point] = []
        taken = 0
        for line in lines:
            parsed = _parse(line)
            if points and len(points) + len(parsed) > POINTS_PER_BATCH:
                break
            points += parsed
            taken += len(line)
        return points, taken

    def discard(self, taken: int) -> None:
        """Forget that many bytes at the front: empty the file, or move to a new one once much has been sent."""
        with self._lock:
            self._head += taken
            left = os.fstat(self._fd).st_size - self._head
            if left == 0:
                os.ftruncate(self._fd, 0)
                self._head = 0
            elif self._head > _ROTATE_BYTES and left < _READ_BYTES:
                with suppress(OSError):
                    self._move(left)

    def is_empty(self) -> bool:
        return os.fstat(self._fd).st_size <= self._head

    def close(self) -> None:
        """Delete the file if it is empty, else leave it to the next process. Not to be used afterwards."""
        with self._lock:
            if self.is_empty():
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _move(self, left: int) -> None:
        """The last `left` bytes to a new file; all stays as it is where the disk does not take them."""
        rest = os.pread(self._fd, left, self._head)
        path, fd = self._create()
        try:
            if os.write(fd, rest) < left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            path.unlink()
            os.close(fd)
            raise
        old_path, old_fd = self._path, self._fd
        self._path, self._fd, self._head = path, fd, 0
        old_path.unlink()
        os.close(old_fd)

    def _create(self) -> tuple[Path, int]:
        path = self._folder / f"{self._run_id}.{uuid.uuid4().hex}.jsonl"
        unlocked = path.with_suffix(".new")  # A name that no other process takes over before the lock is held.
        fd = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        unlocked.rename(path)
        return path, fd

    def _take_over(self, leftover: Path) -> None:
        size = os.fstat(self._fd).st_size
        try:
            with leftover.open("rb") as source, open(os.dup(self._fd), "ab") as mine:
                fcntl.flock(source, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.copyfileobj(source, mine)
                mine.write(b"\n")  # Its last line may be torn.
            leftover.unlink(missing_ok=True)
        except OSError as error:  # Its process lives, or another took it first.
            os.ftruncate(self._fd, size)  # Of a full disk too: it stays where it is.
            log.debug("%s is left alone: %s", leftover, error)


class MetricLog:
    """Logs a run's metrics in the background. No method raises because of MLflow, the network or the disk."""

    def __init__(
        self,
        tracking_uri: str,
        run_id: str,
        spool: Path,
        *,
        step: int = 0,
        flush_interval_s: float = 1.0,
        max_backoff_s: float = 30.0,
    ) -> None:
        """Open the log of a run that stands at `step`.

        `tracking_uri` is resolved (`TrackingConfig.resolved`); `spool` is a folder, best one that the run's next
        process sees too. Raises OSError when it cannot be written.
        """
        self._uri = tracking_uri
        self._run_id = run_id
        self._spool = Spool(spool, run_id)
        self._interval_s = flush_interval_s
        self._max_backoff_s = max_backoff_s
        self._client: MlflowClient | None = None
        self._warned: set[str] = set()
        self._closed = False
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._step = step
        self._thread = threading.Thread(target=self._deliver, name="metric-log", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take `values` at `step`, stamped with the time now; returns within a disk write. From any thread; steps may come late."""
        self._step = max(self._step, step)
        self._append(step, values)

    def at(self, step: int) -> None:
        """The run stands at `step`."""
        self._step = step

    def log_now(self, values: Mapping[str, float]) -> None:
        """Take `values` at the latest step, for what is measured by the clock. From any thread."""
        self._append(self._step, values)

    def unsent(self) -> bytes:
        """What MLflow has not taken yet, for another machine to `resend` if this one is lost."""
        return self._spool.unsent()

    def resend(self, unsent: bytes) -> None:
        """Take another process's `unsent`, but for what its file, if it was on this machine, has brought already: else an outage over
        several restarts would double it each time. What it sent after all changes nothing."""
        here = set(self._spool.unsent().splitlines())
        missing = [line + b"\n" for line in dict.fromkeys(unsent.splitlines()) if line not in here]
        try:
            self._spool.append(b"".join(missing))
        except OSError as error:
            self._warn_once("spool", f"points of an earlier process were lost: {error}")

    def close(self, timeout_s: float = 10.0) -> bool:
        """Send what is left, for at most `timeout_s`. False when points remain in the spool."""
        if self._closed:
            return True
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():  # It hangs in a request: the points stay in the spool, which it still uses.
            return False
        delivered = self._spool.is_empty()
        self._spool.close()
        self._closed = True
        return delivered

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        try:
            points = [(metric_name(name), float(value)) for name, value in values.items()]
            time_ms = int(time.time() * 1000)
            for start in range(0, len(points), _VALUES_PER_LINE):
                record = {"step": step, "time_ms": time_ms, "values": dict(points[start : start + _VALUES_PER_LINE])}
                self._spool.append(json.dumps(record).encode() + b"\n")
        except (OSError, TypeError, ValueError) as error:
            self._warn_once("spool", f"metrics of step {step} were lost: {error}")

    def _deliver(self) -> None:
        quieten_mlflow()
        from mlflow.utils.logging_utils import suppress_logs_in_thread

        delay_s = self._interval_s
        with suppress_logs_in_thread():  # MLflow would print a traceback for each failed attempt.
            while True:
                stopping = self._stop.wait(delay_s)
                delivered = self._send_all()
                if stopping and (delivered or time.monotonic() > self._deadline):
                    return
                if stopping:
                    time.sleep(min(0.5, self._interval_s))
                delay_s = self._interval_s if delivered else min(2 * delay_s, self._max_backoff_s)

    def _send_all(self) -> bool:
        """Everything that is spooled now. False when the store does not take it."""
        from mlflow.exceptions import MlflowException

        sent = 0
        while not self._spool.is_empty():
            points, taken = self._spool.read()
            if not taken:
                return True
            try:
                self._send(points)
            except Exception as error:  # Whatever a store or its driver raises must not end this thread.
                if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
                    self._warn_once("refused", f"MLflow refused {len(points)} points, they are dropped: {error.message}")
                else:
                    self._warn_once("outage", f"metrics are kept in a file until MLflow takes them: {_brief(error)}")
                    return False
            self._spool.discard(taken)
            sent += len(points)
        if "outage" in self._warned and sent:
            self._warned.discard("outage")
            log.info("MLflow takes metrics again; %d points were delivered", sent)
        return True

    def _send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        database = sqlite_file(self._uri)
        if database is not None and not database.exists():
            raise ServiceError(f"{database} is not on this machine; with several machines, set tracking.uri to a server")
        if (reason := outage(self._uri)) is not None:
            raise ServiceError(f"{without_password(self._uri)} gives {reason}")
        if self._client is None:
            self._client = open_client(TrackingConfig(uri=self._uri))
        if points:
            metrics = [Metric(name, value, time_ms, step) for name, value, time_ms, step in points]
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("run %s: %s", self._run_id, message)


@contextmanager
def system_metrics(metric_log: MetricLog, *, interval_s: float = 10.0) -> Iterator[None]:
    """Log this machine's use as MLflow's `system/...` metrics while inside, at the run's current step.

    MLflow's own readings (psutil, NVML), sent through the spool: its SystemMetricsMonitor ends at the first outage.
    """
    monitors = _monitors()
    stop = threading.Event()

    def read() -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values

    def watch() -> None:
        try:
            read()  # psutil counts from the previous reading.
            while not stop.wait(interval_s):
                metric_log.log_now(read())
        except Exception as error:  # psutil and NVML have errors of their own; none is worth a run.
            log.warning("no more system metrics: %s", error)

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=interval_s)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        log.debug("no GPU readings: %s", error)
    return monitors


def _parse(line: bytes) -> list[Point]:
    """The points of one spooled line; none for a line that a kill or a full disk tore."""
    try:
        record = json.loads(line)
        step, time_ms = int(record["step"]), int(record["time_ms"])
        return [(name, float(value), time_ms, step) for name, value in record["values"].items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _brief(error: Exception) -> str:
    return without_password(str(error).strip().split("\n", 1)[0])[:300]
