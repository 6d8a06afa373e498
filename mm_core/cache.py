"""Where this machine keeps copies of what came from elsewhere, and what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$MM_CACHE`, else `~/.cache/mm`. Anything in it may be removed while nothing runs."""
    return Path(os.environ.get("MM_CACHE") or Path.home() / ".cache" / "mm")
