"""What docs/data.md tells people to type works as it stands."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from pathlib import Path

import duckdb
import pytest

from mm_core.data.split import split
from pipelines.index import build_index

GUIDE = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.mark.usefixtures("ray_cluster")
def test_the_guide_to_an_index_runs(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split(build_index([str(corpus / "train")], "index"), heldout=0.1, seed=0)
    lines = GUIDE.read_text(encoding="utf-8").partition("With Python, from shards to the plan:")[2].splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    assert "plan.resolve" in code
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(code, str(GUIDE), "exec"), {})
    assert "330" in shown.getvalue()
    assert re.fullmatch(r"[0-9a-f]{32}", shown.getvalue().splitlines()[-1])
    of_index, of_ledger = re.findall(r"^    (SELECT .*;)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert duckdb.sql(of_index).fetchall() == [(None, 330)]
    assert {reason for reason, _ in duckdb.sql(of_ledger).fetchall()} == {None, "held_out"}
