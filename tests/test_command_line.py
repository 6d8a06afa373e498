"""The program as a whole: what a person sees when a command fails, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import mm

# Commands that end as real ones do, joined to the real program.
PROGRAM = """
import os, signal, time
import mm
from mm_core.errors import ConfigError

@mm.app.command()
def refuse():
    raise ConfigError("width=3 is odd: give an even one")

@mm.app.command()
def break_down():
    raise RuntimeError("two\\nlines")

@mm.app.command()
def wait_for(name: str):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(60)

mm.main()
"""
HEAVY = ("torch", "ray", "mlflow", "transformers", "pyarrow", "numpy", "fastapi")


def run(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(mm.__file__).parent)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": root} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("command", "line", "code"),
    [
        (("refuse",), "error: width=3 is odd: give an even one", 2),
        (("break-down",), "internal error: RuntimeError: two lines (mm --debug … shows where; please report it)", 1),
        (("wait-for", "SIGINT"), "interrupted", 130),
        (("wait-for", "SIGTERM"), "interrupted", 130),
    ],
)
def test_an_error_is_one_line(tmp_path: Path, command: tuple[str, ...], line: str, code: int) -> None:
    process = run(*command, folder=tmp_path)
    assert (process.stdout, process.stderr, process.returncode) == ("", f"{line}\n", code)


@pytest.mark.parametrize("command", ["refuse", "break-down"])
def test_the_traceback_is_shown_on_request(tmp_path: Path, command: str) -> None:
    for process in (run("--debug", command, folder=tmp_path), run(command, folder=tmp_path, MM_DEBUG="1")):
        assert "Traceback" in process.stderr
        assert process.returncode == 1


@pytest.mark.parametrize("command", [("no-such-command",), ("train",), ("train", "--no-such-option"), ("serve",)])
def test_wrong_use(tmp_path: Path, command: tuple[str, ...]) -> None:
    process = run(*command, folder=tmp_path)
    assert process.returncode == 2
    assert "Usage: " in process.stderr
    assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = f"import sys, mm; print([name for name in {HEAVY} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.stdout == "[]\n", process.stderr


def test_every_command_has_an_example() -> None:
    assert [path for path, text in commands(get_command(mm.app), "mm") if f"Example: {path}" not in text and f"; {path}" not in text] == []


def commands(command: typer.core.TyperCommand | typer.core.TyperGroup, path: str) -> Iterator[tuple[str, str]]:
    """Every command as it is typed, with its help."""
    if not isinstance(command, typer.core.TyperGroup):
        yield path, command.help or ""
        return
    for name, below in command.commands.items():
        yield from commands(below, f"{path} {name}")


def test_the_demo_passes_only_where_every_figure_is_three_times_chance() -> None:
    report = {"zeroshot": {"top1": (0.31, 0.1)}, "retrieval": {"t2i_r5": (0.16, 0.05), "i2t_r5": (0.5, 0.05)}}
    assert mm.above_chance(report)
    for kind, key in (("zeroshot", "top1"), ("retrieval", "t2i_r5"), ("retrieval", "i2t_r5")):
        value, chance = report[kind][key]
        low = report | {kind: report[kind] | {key: (2.9 * chance, chance)}}
        assert not mm.above_chance(low), value
