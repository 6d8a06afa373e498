"""`make audit`: flaws and floors, and that what was not looked up is no pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.audit import audit, below_floors, flaws, read_pinned
from cluster.machine import FLOORS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_what_mm_pins_keeps_the_floors() -> None:
    assert list(below_floors(read_pinned(CONSTRAINTS))) == []


def test_a_package_below_its_floor_is_named() -> None:
    pinned = dict(FLOORS) | {"ray": "2.52.0"}
    del pinned["mlflow"]
    assert [said.split(":")[0] for said in below_floors(pinned)] == [
        f"ray 2.52.0 is below {FLOORS['ray']}, before which it has published remote code execution flaws",
        f"mlflow is not pinned, and must be at least {FLOORS['mlflow']}",
    ]


def test_flaws_are_told_with_the_version_that_mends_them() -> None:
    report = {
        "dependencies": [
            {"name": "ray", "version": "2.52.0", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["2.54.0", "2.56.1"]}]},
            {"name": "six", "version": "1.17.0", "vulns": []},
            {"name": "mm-own", "skip_reason": "Dependency not found on PyPI"},
        ]
    }
    assert flaws(report) == (["ray 2.52.0: CVE-2026-1, mended in 2.56.1"], 2, ["mm-own"])


def test_a_package_that_was_not_looked_up_is_named_and_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("".join(f"{name}=={floor}\n" for name, floor in FLOORS.items()))
    good: list[dict[str, Any]] = [{"name": name, "version": floor, "vulns": []} for name, floor in FLOORS.items()]
    for more, well in ([], True), ([{"name": "mm-own", "skip_reason": "Dependency not found on PyPI"}], False):
        monkeypatch.setattr("cluster.audit._ask", lambda *_, more=more: {"dependencies": [*good, *more]})
        said, passed = audit(pinned)
        assert passed == well
        assert any("NOT AUDITED: mm-own" in line for line in said) != well


def test_without_a_network_it_says_so_and_is_no_pass(tmp_path: Path) -> None:
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("".join(f"{name}=={floor}\n" for name, floor in FLOORS.items()))
    said, well = audit(pinned, ["--vulnerability-service", "osv", "--osv-url", "http://127.0.0.1:9", "--timeout", "1"])
    assert "are kept" in said[0]
    assert said[-1].startswith("NOT AUDITED: the database of published flaws is out of reach here")
    assert not well
