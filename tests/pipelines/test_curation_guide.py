"""What docs/curation.md tells people to type works as it stands."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mm
from mm_core.curation.ruleset import RULES

GUIDE = (Path(__file__).parents[2] / "docs" / "curation.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("ray_cluster")
def test_every_command_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", GUIDE, re.MULTILINE)]
    (rules,) = [block for block in blocks if block.lstrip().startswith("rules:")]
    (tmp_path / "rules.yaml").write_text(rules)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("mm ")]
    assert len(commands) == 5
    for command in commands:
        done = CliRunner().invoke(mm.app, shlex.split(command)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_every_rule_is_in_the_guide() -> None:
    assert set(RULES) <= set(re.findall(r"`(\w+)`", GUIDE.partition("## The rules")[2]))
