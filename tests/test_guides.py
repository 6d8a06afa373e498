"""Every `mm` command in the README and the guides is one that the program takes, option by option. What they do is tested elsewhere."""

from __future__ import annotations

import re
import shlex
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


def test_there_are_commands_to_look_at() -> None:
    assert {"mm data index corpus/train --out index", "mm serve models:/clip-demo@champion --port 8000 --search vectors"} <= set(
        commands(PAGES[0])
    )
