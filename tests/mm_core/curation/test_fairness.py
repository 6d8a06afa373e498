from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from mm_core.curation.fairness import Fates, count_groups, difference_intervals, report_groups
from mm_core.curation.groups import Groups, GroupTerms
from mm_core.curation.rows import Rows
from mm_core.curation.text_file import TextFile

GIVEN = GroupTerms.parse(
    TextFile("groups: {gender: {women: [woman], men: [man]}, job: {doctor: [doctor], nurse: [nurse]}}\ncrosses: [[job, gender]]")
)
FACTS = {"ledger": "it", "ledger_fingerprint": "f", "terms": "t"}


def rows(texts: list[str]) -> Rows:
    return Rows(pa.table({"captions": pa.array([[text] for text in texts], pa.list_(pa.string()))}), {})


def test_groups_and_crossings_are_counted_before_and_after() -> None:
    some = rows(["a woman", "a man, doctor", "a woman and a man", "the woman is a doctor", "a tree"])
    fates = Fates(np.array([1, 0, 2, 0.5, 0]), np.array([0, 1, 0, 0, 3], dtype=np.uint64), 2)
    report = report_groups(GIVEN, count_groups(Groups(GIVEN), some, [fates]), ["a", "b"], 0.05, FACTS)
    gender = {cell.groups[0]: cell for cell in report.categories["gender"]}
    assert {name: (cell.samples, cell.kept) for name, cell in gender.items()} == {"women": (3, 3), "men": (2, 1), "none": (1, 0)}
    assert gender["men"].rules == {"a": 0.5, "b": 1}
    assert gender["none"].rules == {"a": 0, "b": 0}
    assert (gender["women"].share, gender["women"].epoch_share) == (0.6, 1.0)
    ((kind, crossed),) = report.crosses
    assert kind == ("job", "gender")
    there = {cell.groups: cell.samples for cell in crossed if cell.samples}
    assert there == {("doctor", "women"): 1, ("doctor", "men"): 1, ("none", "women"): 2, ("none", "men"): 1, ("none", "none"): 1}
    assert all(cell.keep_rate is None for cell in crossed if not cell.samples)
    assert (report.samples, report.kept, report.differences) == (5, 3, [])


def test_counts_of_parts_add_up() -> None:
    texts = ["a woman", "a man doctor", "a nurse", "a tree"] * 20
    rng = np.random.default_rng(0)
    repeat, fails = rng.random(80) * 3, rng.integers(0, 8, 80).astype(np.uint64)
    groups = Groups(GIVEN)
    whole = count_groups(groups, rows(texts), [Fates(repeat, fails, 3)])
    parts = [count_groups(groups, rows(texts[p]), [Fates(repeat[p], fails[p], 3)]) for p in (slice(0, 7), slice(7, 80))]
    np.testing.assert_array_equal(whole, sum(parts))


@pytest.mark.parametrize(
    ("kept", "samples", "differ"),
    [((900, 500), (1000, 1000), True), ((9, 5), (10, 10), False), ((520, 500), (1000, 1000), False), ((900, 0), (1000, 0), False)],
)
def test_only_what_surely_differs_by_more_than_the_bound_is_told(kept: tuple[int, int], samples: tuple[int, int], differ: bool) -> None:
    counts = np.zeros((1 + 3 + 3 + 9, 4), dtype=np.int64)
    counts[1:3] = [[n, k, k << 24, n - k] for k, n in zip(kept, samples, strict=True)]
    found = report_groups(GIVEN, counts, ["a"], 0.05, FACTS).differences
    assert [(each.rule, each.groups) for each in found] == ([(None, ("women", "men")), ("a", ("women", "men"))] if differ else [])


def test_crossings_that_differ_in_one_category_are_compared() -> None:
    """Of doctors fewer women are kept, of nurses fewer men: in all, as many of both."""
    counts = np.zeros((1 + 3 + 3 + 9, 4), dtype=np.int64)
    cells = dict(zip(GIVEN.cells[("job", "gender")], counts[7:], strict=True))
    for cell, kept in {("doctor", "women"): 500, ("doctor", "men"): 900, ("nurse", "women"): 900, ("nurse", "men"): 500}.items():
        cells[cell][:] = 1000, kept, kept << 24, 0
    counts[1:3] = counts[4:6] = 2000, 1400, 1400 << 24, 0
    found = report_groups(GIVEN, counts, ["a"], 0.05, FACTS).differences
    assert sorted((each.category, each.within, each.groups) for each in found) == [
        ("gender", ("doctor",), ("men", "women")),
        ("gender", ("nurse",), ("women", "men")),
        ("job", ("men",), ("doctor", "nurse")),
        ("job", ("women",), ("nurse", "doctor")),
    ]
    assert {each.rule for each in found} == {None}


def test_intervals_are_newcombes() -> None:
    """His example (a), method 10: 56 of 70 against 48 of 80."""
    lows, highs = difference_intervals(np.array([56, 48]), np.array([70, 80]))
    assert (lows[0, 1], highs[0, 1]) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    assert (lows[1, 0], highs[1, 0]) == (pytest.approx(-highs[0, 1]), pytest.approx(-lows[0, 1]))
