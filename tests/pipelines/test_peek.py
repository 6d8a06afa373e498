from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mm
from mm_core.curation.ruleset import RuleSet
from mm_core.data import side_table
from mm_core.data.among import Among
from mm_core.data.index import Index
from mm_core.data.ledger import compile_kept
from mm_core.data.split import write_ledger
from mm_core.errors import ConfigError
from pipelines.curate.filter import filter_index
from pipelines.curate.peek import peek
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    found = build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("peek") / "index"))
    rules = {"short": {"rule": "words", "min": 6}, "long": {"rule": "characters", "max": 90}, "who": {"rule": "personal", "action": "mask"}}
    filter_index(found, RuleSet.parse(rules, where="test"), "ruled")
    weights = np.arange(found.summary.rows) % 3 / 2
    write_ledger(found, "weighed", rule="test", repeat=weights, reason="third")
    return found


def ran(*arguments: str) -> tuple[str, dict[str, Any]]:
    done = CliRunner().invoke(mm.app, ["data", "peek", *arguments], catch_exceptions=False)
    as_json = CliRunner().invoke(mm.app, ["data", "peek", *arguments, "--json"], catch_exceptions=False)
    return done.stdout, dict(json.loads(as_json.stdout.splitlines()[-1]))


def test_kept_samples_are_shown_with_captions_sizes_and_weights(index: Index) -> None:
    text, found = ran(f"{index.url}#ruled", "--ledger", "weighed", "--n", "5")
    kept = set(compile_kept(index, ["ruled", "weighed"]).ordinals.tolist())
    assert len(found["samples"]) == 5
    assert {sample["ordinal"] for sample in found["samples"]} <= kept
    for sample in found["samples"]:
        (row,) = index.rows(sample["ordinal"], sample["ordinal"] + 1, ["uid", "key", "captions", "width", "height"]).to_pylist()
        assert (sample["uid"], sample["captions"], sample["width"]) == (row["uid"], row["captions"], row["width"])
        assert sample["repeat"] == sample["ordinal"] % 3 / 2
        assert sample["place"].endswith(f": {row['key']}")
        assert sample["place"] in text
        assert f"jpeg {row['width']}x{row['height']}" in text
    assert ran(f"{index.url}#ruled,weighed", "--n", "5", "--seed", "1")[1] != found


def test_what_is_dropped_for_a_reason_is_shown_with_pictures_in_a_page(index: Index, tmp_path: Path) -> None:
    page = tmp_path / "short.html"
    text, found = ran(f"{index.url}#ruled", "--reason", "short", "--n", "3", "--out", str(page))
    assert [sample["reason"] for sample in found["samples"]] == ["ruled: short"] * 3
    assert "ruled: short" in text
    html = page.read_text()
    assert html.count("data:image/jpeg;base64,") == 3
    assert "Made by <code>mm data peek</code>" in html
    assert all(sample["uid"] in html for sample in found["samples"])
    assert ran(f"{index.url}#ruled", "--reason", "ruled: short", "--n", "3")[1]["samples"] == found["samples"]
    with pytest.raises(ConfigError, match=r"dropped for 'shrot'; reasons are .*ruled: long.*weighed: third; did you mean 'short'"):
        ran(f"{index.url}#ruled,weighed", "--reason", "shrot")
    with pytest.raises(ConfigError, match="name one with --ledger"):
        ran(index.url, "--reason", "short")


def test_chunks_are_looked_at_until_there_are_enough(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_table, "CHUNK_ROWS", 100)
    assert len({one.shown.ordinal for one in peek(index, Among(), 250)}) == 250
    assert len(peek(index, Among(), 500)) == index.summary.samples
