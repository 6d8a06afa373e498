"""A run's folder: what `mm train` keeps of a run beside its checkpoints.

STORAGE/NAME/begun            by whom, while there is no run.json yet
STORAGE/NAME/run.json         what was asked for, the data it was asked for, the tracking run
STORAGE/NAME/tokenizer/       the tokenizer, in Hugging Face's layout
STORAGE/NAME/checkpoint_*     as `mm_core.training.checkpoints` has them
STORAGE/NAME/goodput.json     where its wall time went
STORAGE/NAME/attempt          how often workers have begun
STORAGE/NAME/unsent.jsonl     points that MLflow had not taken at the last checkpoint
STORAGE/NAME/standstill/      where a rank stood that made no progress
STORAGE/NAME/zeroshot_index/  of the classes that evaluations use
STORAGE/NAME/bundle/          the finished model
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
import shutil
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_core.address import absolute, is_local
from mm_core.config import Config, flatten
from mm_core.data.ledger import Source
from mm_core.errors import CheckpointError, ConfigError
from mm_core.store import make_folder, open_file, open_store, write_whole
from mm_core.training.checkpoints import CheckpointFolder

logger = logging.getLogger(__name__)
_BEGUN = "begun"
_FRESH_S = 5
_MANIFEST = "mm.json"
"""Of a bundle (`mm_core.bundle`), which is not imported: it brings the models' library."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunRecord(Config):
    """run.json."""

    identity: dict[str, Any]
    """`TrainRun.identity()`: what must not change when a run is continued."""
    config: dict[str, Any]
    sources: tuple[Source, ...]
    data_fingerprint: str
    tracking_run_id: str


@dataclass(frozen=True)
class RunFolder:
    """Addresses inside the folder of one run."""

    storage: str
    name: str

    @classmethod
    def of(cls, storage: str, name: str) -> RunFolder:
        """
        Raises:
            ConfigError: a folder or URL could not be called so.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"run name {name!r} may have letters, digits, '.', '_' and '-', up to 100, and starts with a letter or digit")
        return cls(absolute(storage), name)

    @property
    def url(self) -> str:
        return f"{self.storage.rstrip('/')}/{self.name}"

    def exists(self) -> bool:
        """Whether there is a run in it."""
        fs, path = open_store(self.url)
        return bool(fs.exists(f"{path}/run.json"))

    def begin(self) -> str:
        """Mark it before anything is in it, and whoever made a mark before is not the one any more. Returns the mark."""
        mark = uuid.uuid4().hex
        write_whole(f"{self.url}/{_BEGUN}", mark.encode())
        return mark

    def is_begun_by(self, mark: str) -> bool:
        """Whether there is no run in it yet, and nobody else has begun one since."""
        try:
            with open_file(f"{self.url}/{_BEGUN}", "rt") as file:
                return self.is_begun() and file.read() == mark
        except FileNotFoundError:
            return False

    def is_begun(self) -> bool:
        """Whether there is no run in it yet, but a start of one, which may have been killed."""
        fs, path = open_store(self.url)
        return bool(fs.exists(f"{path}/{_BEGUN}")) and not self.exists()

    def holds_something(self) -> bool:
        """Whether there is anything in it but a mark: what is not a run is not ours to write over or remove."""
        return any(not posixpath.basename(file).startswith(_BEGUN) for file in self._entries())

    def read(self) -> RunRecord:
        """
        Raises:
            CheckpointError: there is no run in it, or one of another version.
        """
        try:
            with open_file(f"{self.url}/run.json", "rt") as file:
                return RunRecord.model_validate(json.load(file))
        except (OSError, ValueError) as error:  # of pydantic, the first line says which class, and the others which fields
            why = " ".join(str(error).split())
            raise CheckpointError(f"{self.url} holds no run that can be continued: {why[:200]}") from None

    def write(self, record: RunRecord) -> None:
        write_whole(f"{self.url}/run.json", record.model_dump_json(indent=1).encode())
        fs, path = open_store(self.url)
        with suppress(OSError):  # beside a run.json it says nothing
            fs.rm_file(f"{path}/{_BEGUN}")

    def remove(self) -> None:
        """The mark last: whoever is killed here leaves a start that was cut off, no foreign folder."""
        fs, path = open_store(self.url)
        for entry in self._entries():
            if posixpath.basename(entry) != _BEGUN:
                fs.rm(entry, recursive=True)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    def _entries(self) -> list[str]:
        fs, path = open_store(self.url)
        return [entry.rstrip("/") for entry in fs.ls(path, detail=False)] if fs.exists(path) else []

    def put(self, local: Path, name: str) -> None:
        """Copy a local folder to `name` below the run's folder, replacing what is there. A bundle that has its manifest is whole."""
        fs, path = open_store(f"{self.url}/{name}")
        if fs.exists(path):
            fs.rm(path, recursive=True)
        for file in sorted((p for p in local.rglob("*") if p.is_file()), key=lambda p: (p.name == _MANIFEST, p)):
            relative = file.relative_to(local).as_posix()
            make_folder(posixpath.dirname(f"{self.url}/{name}/{relative}"))
            fs.put_file(str(file), f"{path}/{relative}")

    def get(self, name: str) -> Path:
        """A local folder with the content of `name`: the folder itself where it is local, else a temporary copy.

        Raises:
            CheckpointError: it is not there.
        """
        fs, path = open_store(f"{self.url}/{name}")
        if not fs.exists(path):
            raise CheckpointError(f"{self.url}/{name} is not there")
        if is_local(self.url):
            return Path(path)
        local = Path(tempfile.mkdtemp(prefix="mm-run-"))
        try:
            fs.get(f"{path.rstrip('/')}/", f"{local}/", recursive=True)
        except BaseException:
            shutil.rmtree(local, ignore_errors=True)
            raise
        return local

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.url)

    def is_finished(self, steps: int) -> bool:
        """Whether its last step has a checkpoint and the model was exported."""
        fs, path = open_store(self.url)
        return self.checkpoints.newest() == steps and bool(fs.exists(f"{path}/bundle/{_MANIFEST}"))

    def read_goodput(self) -> dict[str, Any]:
        """What was kept of where its time went; nothing of a new run."""
        try:
            with open_file(f"{self.url}/goodput.json", "rt") as file:
                kept: dict[str, Any] = json.load(file)
                return kept
        except (FileNotFoundError, ValueError):
            return {}

    def write_goodput(self, record: dict[str, Any]) -> None:
        write_whole(f"{self.url}/goodput.json", json.dumps(record).encode())


def check_shared(url: str, tracking_run_id: str) -> None:
    """On a worker's machine: that its disk has the driver's folder of this run. With another one each machine would write its part of every
    checkpoint to itself, and none could be read.

    Raises:
        ConfigError: it has not.
        OSError: it cannot be read, for now.
    """
    if not is_local(url):
        return
    for _ in range(_FRESH_S):  # a network disk may show what was written elsewhere some seconds later
        with suppress(FileNotFoundError, ValueError), open_file(f"{url}/run.json", "rt") as file:
            if json.load(file)["tracking_run_id"] == tracking_run_id:
                return
        time.sleep(1)
    raise ConfigError(
        f"{url} on {socket.gethostname()}, where a worker runs, is not the folder that the run's driver has: mount one for all machines"
        " there, or keep runs in an object store (--set storage=s3://…)"
    )


def newest_run(storage: str, identity: dict[str, Any], data_fingerprint: str) -> RunFolder | None:
    """The run under `storage` that was started last with this configuration on this data."""
    base = absolute(storage)
    fs, path = open_store(base)
    matches: list[tuple[float, RunFolder]] = []
    for file in fs.glob(f"{path}/*/run.json"):
        folder = RunFolder(base, posixpath.basename(posixpath.dirname(file)))
        try:
            record = folder.read()
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        if record.identity == identity and record.data_fingerprint == data_fingerprint:
            matches.append((fs.modified(file).timestamp(), folder))
    return max(matches, key=lambda match: match[0])[1] if matches else None


def check_same(record: RunRecord, identity: dict[str, Any], data_fingerprint: str, where: str) -> None:
    """
    Raises:
        CheckpointError: the run in `where` is another; the first differing key is named.
    """
    if record.data_fingerprint != data_fingerprint:
        began = " ".join(f"--data {source}" for source in record.sources)
        raise CheckpointError(f"the run {where} was started on other data: continue it with that it began with: {began}")
    old, new = dict(flatten(record.identity)), dict(flatten(json.loads(json.dumps(identity))))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise CheckpointError(
                f"the checkpoint in {where} is of another run: {key} was {old.get(key)!r}, now {new.get(key)!r};"
                " give the values it began with, or another --name"
            )
