"""Runs a command again where a signal killed it, as a kernel that is out of memory does: `python cluster/again.py python -m mm train …`.

A command that ends by itself has ended, whatever its code; so has one that was asked to (Ctrl-C, SIGTERM). Of a job it is what Ray starts
and signals, together with the command.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

_TRIES = 8
_REST_S, _LONG_S = 5.0, 60.0
"""Between tries, but after one that lived for long, which another may as well."""


def run(command: list[str], *, rest_s: float = _REST_S, long_s: float = _LONG_S) -> int:
    """The command's exit code, as a shell has it: 128 and more for a signal."""
    asked = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: asked.set())
    for left in reversed(range(_TRIES)):
        child, began = subprocess.Popen(command), time.monotonic()
        if asked.is_set():  # before it was there to hear it
            child.terminate()
        code = child.wait()
        if code >= 0 or asked.is_set() or left == 0:
            break
        name = signal.Signals(-code).name
        rest = rest_s if time.monotonic() - began < long_s else 0
        print(f"the command was killed ({name}): it is started again in {rest:g} s, {left} times at most", file=sys.stderr, flush=True)
        if asked.wait(rest):
            break
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
