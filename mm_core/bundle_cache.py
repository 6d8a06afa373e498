"""Bundles from elsewhere, as folders of this machine: fetched once, checked, whole or not there."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mm_core.bundle import MANIFEST, read_manifest
from mm_core.cache import cache_folder
from mm_core.errors import BundleError
from mm_core.store import open_store, reaching


def bundle_digest(folder: Path) -> str:
    """SHA-256 of the manifest, which holds those of all other files."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def keep_bundle(folder: Path, digest: str, source: str, fetch: Callable[[Path], Path]) -> Path:
    """`folder`, holding the bundle with this digest: as it is, or fetched; other processes see all of it or nothing.

    Args:
        source: where it comes from, for messages.
        fetch: brings the bundle into a folder below the given one, which it returns.

    Raises:
        BundleError: what was fetched is another, or damaged.
    """
    if holds(folder, digest):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
        fetched = fetch(Path(temporary))
        if not (fetched / MANIFEST).is_file() or bundle_digest(fetched) != digest:
            raise BundleError(f"what is stored at {source} is not the bundle that was registered; register it again")
        read_manifest(fetched, verify=True)
        if folder.exists() and not holds(folder, digest):
            shutil.move(folder, Path(temporary) / "damaged")
        try:
            fetched.rename(folder)
        except OSError:
            if not holds(folder, digest):  # Unless another process was first.
                raise
    return folder


def bundle_at(url: str) -> Path:
    """The bundle at `url` of an fsspec store, or of the run whose folder that is.

    Raises:
        BundleError: there is none, or it cannot be read.
    """
    for place in (url.rstrip("/"), f"{url.rstrip('/')}/bundle"):
        digest = _digest_at(place)
        if digest is not None:
            return keep_bundle(cache_folder() / "bundles" / digest[:32], digest, place, partial(_fetch, place))
    raise BundleError(f"{url} is neither a bundle nor the folder of a finished run")


def _digest_at(url: str) -> str | None:
    """The digest of the bundle at `url`, or None where there is none."""
    try:
        with reaching(url):
            fs, path = open_store(url)
            return hashlib.sha256(fs.cat_file(f"{path}/{MANIFEST}")).hexdigest()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ImportError) as error:  # ValueError and ImportError: fsspec, of a protocol it does not have
        raise BundleError(f"cannot read the bundle at {url}: {error}") from None


def _fetch(url: str, target: Path) -> Path:
    with reaching(url):
        fs, path = open_store(url)
        fs.get(f"{path}/", f"{target}/bundle/", recursive=True)
    return target / "bundle"


def holds(folder: Path, digest: str) -> bool:
    """Whether `folder` is the bundle with this digest, or with one that begins so, undamaged."""
    if not (folder / MANIFEST).is_file() or not bundle_digest(folder).startswith(digest):
        return False
    try:
        read_manifest(folder, verify=True)
    except BundleError:
        return False
    return True
