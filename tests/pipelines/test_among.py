"""`--ledger`, and `INDEX#LEDGER`, on the commands that make ledgers and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import mm
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger, compile_kept
from mm_core.data.scores import Scores
from mm_core.errors import ConfigError, DataError
from pipelines.index import build_index

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def index(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    found = build_index([str(corpus / "train")], str(tmp_path_factory.mktemp("among") / "index"))
    run("split", found.url, "--heldout", "0.5", "--names", "a,b")
    run("split", found.url, "--heldout", "0.3", "--seed", "1", "--names", "c,d")
    return found


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(mm.app, ["data", *arguments, "--json"], catch_exceptions=False)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def kept(index: Index, *names: str) -> set[int]:
    return set(compile_kept(index, names).ordinals.tolist())


def reasons(index: Index, name: str) -> list[str | None]:
    return list(pa.concat_tables(Ledger(index, name).decisions.tables())["reason"].to_pylist())


def test_a_filter_counts_and_judges_what_ledgers_keep_and_the_rest_keep_their_first_reason(index: Index, tmp_path: Path) -> None:
    run("score", f"{index.url}#a,c", "image")
    values = Scores(index, "image").values.read(0)["sharpness"].to_numpy(zero_copy_only=False)
    both = kept(index, "a", "c")
    assert set(np.flatnonzero(~np.isnan(values)).tolist()) == both
    with pytest.raises(ConfigError, match=r"holds scores by other settings .*, among a and c .*remove it first"):
        run("score", index.url, "image")
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  sharp: {rule: sharpness, top: 0.5}\n  who: {rule: personal, action: mask, kinds: [email]}\n")
    said = run("filter", f"{index.url}#a", "--ledger", "c", "--rules", str(rules), "--name", "sharp")
    ordered = sorted(both, key=lambda row: -values[row])
    assert kept(index, "sharp") == set(ordered[: round(len(both) / 2)])
    dropped_by_a, dropped_by_c = (set(range(index.summary.rows)) - kept(index, name) for name in ("a", "c"))
    expected = dict.fromkeys(ordered[round(len(both) / 2) :], "sharp")
    expected |= dict.fromkeys(dropped_by_c, "c: held_out") | dict.fromkeys(dropped_by_a, "a: held_out")
    assert reasons(index, "sharp") == [expected.get(row) for row in range(index.summary.rows)]
    assert said["dropped"] == {reason: list(expected.values()).count(reason) for reason in set(expected.values())}
    assert run("filter", index.url, "--ledger", "a", "--ledger", "c", "--rules", str(rules), "--name", "sharp") == said
    with pytest.raises(ConfigError, match=r"has a ledger 'sharp' by other rules .*, among a and c"):
        run("filter", f"{index.url}#a", "--rules", str(rules), "--name", "sharp")
    with pytest.raises(ConfigError, match="'a' cannot be written while it is read"):
        run("filter", f"{index.url}#a", "--rules", str(rules), "--name", "a", "--replace")

    run("split", f"{index.url}#sharp", "--heldout", "0.5", "--seed", "7", "--names", "one,two")
    assert kept(index, "one") | kept(index, "two") == kept(index, "sharp")
    assert not kept(index, "one") & kept(index, "two")
    assert Ledger(index, "one").summary().mask == ("email",), "what is masked stays masked"
    assert {"sharp: a: held_out", "sharp: sharp", "held_out", None} <= set(reasons(index, "one"))
    with pytest.raises(ConfigError, match=r"has a ledger 'one' by other rules.*--replace"):
        run("split", index.url, "--heldout", "0.5", "--seed", "7", "--names", "one,two")
    assert (
        sum(run("split", index.url, "--heldout", "0.5", "--seed", "7", "--names", "one,two", "--replace").values()) == index.summary.samples
    )


def test_groups_take_ledgers_behind_the_index(index: Index, tmp_path: Path) -> None:
    terms = tmp_path / "groups.yaml"
    terms.write_text("groups: {colour: {red: [red], blue: [blue]}}")
    command = ["groups", index.url, "--terms", str(terms), "--ledger", "a", "--ledger", "c"]
    found = run("groups", f"{index.url}#a,c", "--terms", str(terms))
    assert found == run(*command)
    assert [report["kept"] for report in found["reports"]] == [len(kept(index, *names)) for names in (("a",), ("c",), ("a", "c"))]


def test_a_ledger_that_is_not_there_is_named_before_anything_is_written(index: Index, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: {long: {rule: words, min: 2}}")
    for command in (
        ["filter", "--rules", str(rules), "--name", "x"],
        ["dedup", "--name", "x", "--method", "exact"],
        ["split", "--names", "x,y"],
        ["score", "hash"],
    ):
        with pytest.raises(DataError, match="has no ledger 'nothing'; it has: a, b, c"):
            run(command[0], f"{index.url}#nothing", *command[1:])
    with pytest.raises(DataError, match="has no ledger 'nothing'; it has: a, b, c"):
        run("dedup", f"{index.url}#a", "--name", "x", "--method", "exact", "--against", f"{index.url}#b,nothing")
    assert not Ledger(index, "x").exists()
    assert Scores(index, "hash").summary() is None
