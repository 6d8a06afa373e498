"""What names a model: the same where its weights, tokenizer and preprocessing are, another where one of them is another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mm_core.bundle import MANIFEST, read_manifest
from mm_core.models.pretrained import hub_commit

_READ = (".json", ".txt", ".model", ".safetensors")
"""What is read of a folder in transformers' layout."""


def model_digest(source: str | Path) -> str:
    """Of a bundle SHA-256 over the digests in its manifest; of a folder over those of the files that are read; of a hub id its commit.

    Raises:
        BundleError: there is no such model.
    """
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        files = read_manifest(folder, verify=False).files
    elif folder.is_dir():
        files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.suffix in _READ and not path.name.startswith(".")}
    else:
        return hub_commit(str(source))
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
