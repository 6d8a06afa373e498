"""Which code runs: what a checkpoint, a bundle and a tracking run say of themselves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VARIABLE = "MM_CODE_REVISION"
"""Set for code that was sent to a cluster without its history."""


def code_revision() -> str:
    """The commit, `-dirty` where files differ from it; of a copy that was sent along, that of its origin; `unknown` outside a checkout."""
    if sent := os.environ.get(VARIABLE):
        return sent
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
