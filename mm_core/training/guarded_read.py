"""Reading checkpoints of torch.distributed.checkpoint without running what is in them.

torch unpickles `.metadata` and what is no tensor: whoever can write to the store would run code in every rank. Here a pickle may name
the classes that a checkpoint is made of, and no other.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, cast

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = "torch.distributed.checkpoint.metadata"
_MADE_OF = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")),
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _MADE_OF:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint is made of: it was tampered with, or is of another torch"
            )
        return super().find_class(module, name)


def _metadata(reader: FileSystemReader, rank: int | None) -> Metadata:
    """As torch's reader returns it."""
    with reader.fs.create_stream(reader._get_metadata_path(rank), "rb") as file:
        metadata: Metadata = _Unpickler(file).load()
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


class _Guarded:
    unread: OSError | None = None
    """Why the metadata could not be read, where the store is to blame; torch says no more than that it has none."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return _metadata(cast(FileSystemReader, self), kwargs.get("rank"))
        except OSError as error:
            self.unread = None if isinstance(error, FileNotFoundError) else error
            raise


class GuardedReader(_Guarded, FileSystemReader):
    """Of a folder on this machine."""


class GuardedFsspecReader(_Guarded, FsspecReader):
    """Of a folder in any store."""


class GuardedPlanner(DefaultLoadPlanner):
    """What is no tensor is numbers, words and lists of them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
