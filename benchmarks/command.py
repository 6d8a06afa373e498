"""The program's own commands, as a benchmark gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def mm(*arguments: str) -> dict[str, Any]:
    """Run `mm ARGUMENTS --json`.

    Returns:
        What it prints.
    """
    print("$ mm", *arguments, file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "mm", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
