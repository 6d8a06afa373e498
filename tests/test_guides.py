"""Every `mm` command in the README and the guides is one that the program takes, option by option. What they do is tested elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import typer

import mm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Lines of code blocks, and what stands in backticks, that begin with `mm` and leave nothing open."""
    text = page.read_text(encoding="utf-8")
    lines = [match[1] for match in re.finditer(r"^(?:    )?(?:\.venv/bin/)?(mm .*)$", text, re.MULTILINE)]
    inline = [match[1] for match in re.finditer(r"`(mm [^`]+)`", text)]
    return [line for line in (*lines, *inline) if not re.search(r"…|\.\.\.|\[[-A-Z#]|\||\\$|COMMAND", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_program_takes_every_command(page: Path) -> None:
    for line in commands(page):
        command: click.Command = typer.main.get_command(mm.app)
        words = [word for word in shlex.split(line, comments=True)[1:] if word != "--debug"]
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{page.name}: {line}: no command {words[0]!r}"
            command = command.commands[words.pop(0)]
        if isinstance(command, click.Group) or not words:
            continue  # a command that is only named
        try:
            command.make_context(command.name, words)
        except click.exceptions.Exit:
            pass
        except click.UsageError as error:
            if not isinstance(error, click.MissingParameter) or line in {f"mm {command.name}"}:
                pytest.fail(f"{page.name}: {line}: {error.format_message()}")


STARTS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    if "mm tls node" in block and "ray start" in block
]


@pytest.mark.parametrize("block", STARTS)
@pytest.mark.parametrize("fails", [True, False])
def test_no_node_starts_without_its_certificate(block: str, fails: bool, tmp_path: Path) -> None:
    """With programs in place of `mm` and `ray`, line by line as in a terminal."""
    for name, does in (("mm", f"test $2 != node || exit {int(fails)}"), ("ray", "test $1 != start || touch started")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "-c", block], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert (tmp_path / "started").exists() is not fails


def test_there_are_commands_to_look_at() -> None:
    assert {"mm data index corpus/train --out index", "mm serve models:/clip-demo@champion --port 8000 --search vectors"} <= set(
        commands(PAGES[0])
    )
