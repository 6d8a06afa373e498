"""Locators: where each sample's bytes are, 24 bytes a sample, memory-mapped, so that position → bytes is an array look-up.

A `.npy` file of a fixed structure, so NumPy alone can open it. Remote files are copied once per node into a cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mm_core.address import is_local
from mm_core.cache import cache_folder
from mm_core.store import open_file, open_store

LOCATOR = np.dtype([("start", "<u8"), ("span", "<u4"), ("shard", "<u4"), ("check", "<u4"), ("flags", "<u2"), ("occurrence", "<u2")])
"""start, span: the bytes of the sample in its shard, headers included. check: CRC-32 of member names and sizes.
flags: see below. occurrence: how many samples of the same key the shard held before."""

DIGEST = np.dtype("V16")
"""`sample.content_digest`, in `digests.npy`: in the locators' order, but in a file of its own, which only `data.verify` needs."""

HAS_IMAGE, HAS_TEXT, HAS_LABEL, BAD = 1, 2, 4, 8
Locators = NDArray[np.void]


def write_parts(target: str, parts: Sequence[str], dtype: np.dtype[Any]) -> int:
    """Join raw part files into one `.npy` at `target` (any fsspec URL), 8 MB at a time. Returns the number of rows."""
    rows = sum(_size(part) for part in parts) // dtype.itemsize
    with open_file(target, "wb") as out:
        npy.write_array_header_1_0(out, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)})
        for part in parts:
            with open_file(part, "rb") as source:
                shutil.copyfileobj(source, out, 8 << 20)
    return rows


def open_mapped(url: str, cache_key: str) -> NDArray[Any]:
    """Memory-map a `.npy`; a remote one is first copied to this node's cache, once, whoever asks."""
    path = Path(url.removeprefix("file://"))
    if not is_local(url):
        path = cache_folder() / "maps" / f"{hashlib.blake2b(f'{url} {cache_key}'.encode(), digest_size=16).hexdigest()}.npy"
        if not path.exists():
            _fetch(url, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _size(url: str) -> int:
    fs, path = open_store(url)
    return int(fs.size(path))


def _fetch(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        try:
            with open_file(url, "rb") as source:
                shutil.copyfileobj(source, temporary, 8 << 20)
            temporary.close()
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise
