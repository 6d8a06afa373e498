"""What docs/curation.md tells people to type works as it stands."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mm
from mm_core.bundle import write_bundle
from mm_core.curation.ruleset import RULES
from mm_core.models.clip import build_clip, clip_tiny
from mm_core.models.tokenizer import special_tokens, train_bpe

GUIDE = (Path(__file__).parents[2] / "docs" / "curation.md").read_text(encoding="utf-8")


@pytest.fixture
def models(tmp_path: Path) -> None:
    """The bundles that runs on the folds would have left."""
    tokenizer = train_bpe(["a red circle"] * 5, vocab_size=320, context_length=32)
    config = clip_tiny().model_copy(update={"vocab_size": len(tokenizer)})
    for seed, run in enumerate(("on-a", "on-b")):
        torch.manual_seed(seed)
        model = build_clip(config, special_tokens(tokenizer))
        folder = tmp_path / "runs" / run / "bundle"
        write_bundle(folder, model=model, tokenizer=tokenizer, config=config, recipe="r", data_fingerprint=run, metrics={})


@pytest.mark.usefixtures("ray_cluster", "models")
def test_every_command_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", GUIDE, re.MULTILINE)]
    for name, first in (("rules.yaml", "rules:"), ("groups.yaml", "groups:")):
        (found,) = [block for block in blocks if block.lstrip().startswith(first)]
        (tmp_path / name).write_text(found.partition("\nmm ")[0])
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("mm ")]
    assert len(commands) == 28
    for command in commands:
        done = CliRunner().invoke(mm.app, shlex.split(command)[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_every_rule_is_in_the_guide() -> None:
    assert set(RULES) <= set(re.findall(r"`(\w+)`", GUIDE.partition("## The rules")[2]))
