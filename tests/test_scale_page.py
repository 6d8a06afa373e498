"""docs/scale.md is what the program prints, from figures that RESULTS.md has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import scale

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_program_prints() -> None:
    assert (ROOT / "docs" / "scale.md").read_text(encoding="utf-8") == scale.page(), "run `python -m benchmarks.scale > docs/scale.md`"


@pytest.mark.parametrize("figure", scale.MEASURED, ids=lambda figure: figure.what[:50])
def test_a_measured_figure_stands_where_it_says(figure: scale.Measured) -> None:
    assert re.search(rf"(?<![\d.,]){re.escape(figure.said)}(?![\d.,]*\d)", figure.quote)
    assert figure.quote in RESULTS


def test_every_assumption_and_figure_is_used_and_told() -> None:
    source = (ROOT / "benchmarks" / "scale.py").read_text(encoding="utf-8")
    names = re.findall(r"^([A-Z0-9_]+) = (?:Measured|Assumed)\(", source, re.MULTILINE)
    assert len(names) == len(scale.MEASURED) + len(scale.ASSUMED)
    for name in names:
        assert len(re.findall(rf"\b{name}\b", source)) >= 3 or name in {"SHARD_SAMPLES"}, f"{name} is in no formula"


def test_more_failures_and_longer_ones_cost_more() -> None:
    day = 86_400.0
    interval = scale.best_interval_s(1.0, day)
    assert interval == pytest.approx((2 * day) ** 0.5)
    assert scale.ettr(day, 0, interval, 1.0) > scale.ettr(day, 600, interval, 1.0) > scale.ettr(3600, 600, interval, 1.0)
    best = scale.ettr(day, 60, interval, 1.0)
    assert best >= max(scale.ettr(day, 60, interval * factor, 1.0) for factor in (0.5, 2.0))
    assert scale.ettr(1e12, 60, 1e6, 0.0) == pytest.approx(1.0, abs=1e-5)
