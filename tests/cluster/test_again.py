"""A command that is killed is started again, one that ends is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

AGAIN = Path(__file__).parents[2] / "cluster" / "again.py"
COUNTED = """
import os, pathlib, signal, sys, time
file = pathlib.Path("n")
n = int(file.read_text()) if file.exists() else 0
file.write_text(str(n + 1))
"""


def again(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, AGAIN, sys.executable, "-c", COUNTED + code], cwd=folder, stderr=subprocess.PIPE, text=True)


def test_one_that_was_killed_is_started_again(tmp_path: Path) -> None:
    process = again("os.kill(os.getpid(), signal.SIGKILL) if n == 0 else sys.exit(3)", tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert (tmp_path / "n").read_text() == "2"
    assert "killed (SIGKILL): it is started again in 5 s, 7 times at most" in said


def test_one_that_lived_for_long_is_started_again_at_once(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(AGAIN.parents[1])!r}); from cluster import again; sys.exit(again.run(sys.argv[1:], long_s=0))"
    )
    killed = COUNTED + "os.kill(os.getpid(), signal.SIGKILL) if n == 0 else sys.exit(3)"
    command = [sys.executable, "-c", program, sys.executable, "-c", killed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "it is started again in 0 s, 7 times at most" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 137])
def test_one_that_ended_is_not(code: int, tmp_path: Path) -> None:
    process = again(f"sys.exit({code})", tmp_path)
    process.communicate(timeout=60)
    assert (process.returncode, (tmp_path / "n").read_text()) == (code, "1")


@pytest.mark.parametrize("tidies", [True, False], ids=["that tidies up", "that had no time to"])
def test_one_that_was_asked_to_end_has_its_time_and_is_not(tidies: bool, tmp_path: Path) -> None:
    """As Ray stops a job: both get the signal."""
    end = "lambda *_: (time.sleep(1), pathlib.Path('tidied').touch(), os._exit(143))"
    handled = f"signal.signal(signal.SIGTERM, {end})\n" if tidies else ""
    wait = f"{handled}pathlib.Path('ready').touch()\ntime.sleep(60)"
    command = [sys.executable, AGAIN, sys.executable, "-c", COUNTED + wait]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 120
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert (tmp_path / "tidied").exists() == tidies
    assert (tmp_path / "n").read_text() == "1"


def test_one_that_is_asked_before_it_is_there_ends_too() -> None:
    """The signal comes between the two programs' starts, and only the first of them hears it."""
    program = """
import os, signal, subprocess, sys
from cluster import again
class Late(subprocess.Popen):
    def __init__(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        super().__init__(*arguments)
subprocess.Popen = Late
sys.exit(again.run(["sleep", "60"]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=AGAIN.parents[1], timeout=120)
    assert done.returncode == 143
