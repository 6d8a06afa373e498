"""Where the processes of a command stand, for the message of a test that waits in vain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil


def stacks(pid: int) -> str:
    """The command's own threads, and those of what its embedded Ray runs for it."""
    found = []
    command = psutil.Process(pid)
    for process in [command, *command.children(recursive=True)]:
        try:
            title = " ".join(process.cmdline()).strip()
            if process.pid == pid or title.startswith("ray::"):
                found.append(f"{title} ({process.status()}, {sum(process.cpu_times()[:2]):.1f} s of a processor)\n{_dump(process.pid)}")
        except psutil.NoSuchProcess:
            continue
    return "\n".join(found)


def _dump(pid: int) -> str:
    """By py-spy, which comes with Ray's dashboard."""
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout or done.stderr
