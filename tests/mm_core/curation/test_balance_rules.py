from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mm_core.curation.balance_rules import ConceptRule
from mm_core.curation.rows import Rows
from mm_core.curation.ruleset import RuleSet
from mm_core.curation.terms import Terms
from mm_core.data.permutation import mix
from mm_core.errors import ConfigError, DataError

GROUPS = "groups:\n  gender: {women: [woman, she], men: [man, he]}\n  animal: {cat: [cat]}\n"
WEIGH = {"rule": "reweight", "terms": "groups.yaml", "category": "gender", "target": {"women": 0.5, "men": 0.5}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "entries.txt").write_text("cat\n\nbig dog\nDog\ndog\nzebra\n")
    (tmp_path / "groups.yaml").write_text(GROUPS)
    return tmp_path


def rows(texts: list[str], first: int = 0) -> Rows:
    table = pa.table({"captions": pa.array([[text] for text in texts], pa.list_(pa.string()))})
    return Rows(table, {}, np.arange(first, first + len(texts), dtype=np.uint64))


def settled(folder: Path, parts: list[Rows], **rules: dict[str, Any]) -> RuleSet:
    unsettled = RuleSet.parse(rules, where="here", folder=folder)
    return unsettled.settled(lambda asked: np.sum([asked.count(part) for part in parts], axis=0))


def counts(rules: RuleSet, name: str) -> dict[str, int]:
    rule = rules.rules[name]
    assert isinstance(rule, ConceptRule)
    return dict(zip(rule.concepts, rule.counts.tolist(), strict=True))


TEXTS = ["a cat", "the big dog", "a dog", "a DOG and a cat", "nothing of it"] * 2000


def test_frequent_entries_are_thinned_to_about_what_is_asked_for_and_rare_ones_kept(folder: Path) -> None:
    some = rows([*TEXTS, "a zebra"])
    rules = settled(folder, [some], even={"rule": "balance", "entries": "entries.txt", "per_entry": 1000})
    assert counts(rules, "even") == {"cat": 4000, "big dog": 2000, "Dog": 6000, "zebra": 1}
    judged = rules.judge(some).judgements[0]
    by_kind = judged.keep[:-1].reshape(-1, 5).sum(axis=0)
    # A sample is kept if one of its entries accepts it: 1/4 of cats, 1/2 of big dogs or 1/6 of dogs.
    expected = 2000 * np.array([1 / 4, 1 - (1 / 2) * (5 / 6), 1 / 6, 1 - (3 / 4) * (5 / 6), 0])
    assert np.abs(by_kind - expected).max() < 4 * np.sqrt(500)
    assert by_kind[4] == 0
    assert judged.keep[-1]
    np.testing.assert_allclose(judged.values[:5] * 2000, expected)


def test_a_sample_is_kept_where_the_draw_of_one_of_its_entries_accepts_it(folder: Path) -> None:
    some = rows([*TEXTS, "a zebra", "a zebra and a dog"])
    rules = settled(folder, [some], even={"rule": "balance", "entries": "entries.txt", "per_entry": 1000, "seed": 3})
    found = counts(rules, "even")
    terms = Terms(list(found))
    expected = []
    for check, text in zip(some.checks, some.table["captions"].to_pylist(), strict=True):
        mine = [n for n, entry in enumerate(terms.texts) if f" {entry.lower()} " in f" {text[0].lower()} "]
        accepts = [Fraction(min(1000, found[terms.texts[n]]), found[terms.texts[n]]) for n in mine]
        expected.append(any(int(mix(3, 7, check, terms.keys[n])) < p * 2**64 for n, p in zip(mine, accepts, strict=True)))
    assert rules.judge(some).judgements[0].keep.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_what_matches_nothing_can_be_kept(folder: Path) -> None:
    some = rows(["a cat", "a bird", ""])
    for unmatched, kept in (("drop", [True, False, False]), ("keep", [True, True, True])):
        rule = {"rule": "balance", "entries": "entries.txt", "per_entry": 5, "unmatched": unmatched}
        assert settled(folder, [some], even=rule).judge(some).judgements[0].keep.tolist() == kept


def test_decisions_hang_on_the_sample_the_entry_and_the_seed_alone(folder: Path) -> None:
    parts = [rows(TEXTS[:3000]), rows(TEXTS[3000:3001], 3000), rows(TEXTS[3001:], 3001)]
    even = {"rule": "balance", "entries": "entries.txt", "per_entry": 1000}
    whole = settled(folder, [rows(TEXTS)], even=even)
    keep = whole.judge(rows(TEXTS)).judgements[0].keep
    divided = pickle.loads(pickle.dumps(settled(folder, parts[::-1], even=even)))
    np.testing.assert_array_equal(keep, np.concatenate([divided.judge(part).judgements[0].keep for part in parts]))
    again = settled(folder, [rows(TEXTS)], even=even | {"seed": 1}).judge(rows(TEXTS)).judgements[0].keep
    assert (again != keep).sum() > 0
    (folder / "entries.txt").write_text("lion\ndog\nbig dog\ncat\n")
    np.testing.assert_array_equal(keep, settled(folder, [rows(TEXTS)], even=even).judge(rows(TEXTS)).judgements[0].keep)


def test_counts_are_of_what_the_rules_before_keep(folder: Path) -> None:
    texts = ["a cat", "cat", "big dog here", "she has a cat", "he has a dog"]
    short, even = {"rule": "words", "min": 2}, {"rule": "balance", "entries": "entries.txt", "per_entry": 2}
    after = settled(folder, [rows(texts)], short=short, even=even, weigh=WEIGH)
    before = settled(folder, [rows(texts)], even=even, short=short)
    assert counts(after, "even")["cat"] == 2
    assert counts(before, "even")["cat"] == 3
    assert counts(after, "weigh") == {"women": 1, "men": 1, "none": 2}


def test_weights_give_the_target_of_those_in_one_group_and_leave_the_others(folder: Path) -> None:
    some = rows(["a woman"] * 10 + ["a man"] * 30 + ["a man and a woman"] * 7 + ["a tree"] * 5)
    rules = settled(folder, [some], weigh=WEIGH)
    verdict = rules.judge(some)
    weights = verdict.weights
    assert verdict.judgements[0].keep.all()
    np.testing.assert_allclose(weights[[0, 10, 40, 47]], [2, 2 / 3, 1, 1])
    assert weights[:10].sum() == pytest.approx(weights[10:40].sum())
    assert weights.sum() == pytest.approx(52)
    labels = verdict.judgements[0].labels
    assert labels is not None
    assert [labels[i].as_py() for i in (0, 10, 40, 47)] == ["women", "men", "several", "none"]
    cut = settled(folder, [some], weigh=WEIGH | {"max_weight": 1.5}).judge(some).weights
    np.testing.assert_allclose(cut[[0, 10]], [1.5, 2 / 3])
    of_none = settled(folder, [some], weigh=WEIGH | {"target": {"women": 0.5, "none": 0.5}}).judge(some).weights
    np.testing.assert_allclose(of_none[[0, 10, 40, 47]], [0.75, 1, 1, 1.5])


def test_a_group_that_nobody_is_in_cannot_be_weighed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rule 'weigh': no sample that gets this far is in 'women' and in no other group of gender"):
        settled(folder, [rows(["a man"])], weigh=WEIGH)


def test_the_hash_is_of_what_a_file_says_and_not_of_where_it_lies(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.txt").write_text((folder / "entries.txt").read_text())
    rule = {"rule": "balance", "per_entry": 5}
    one, copy = (RuleSet.parse({"a": rule | {"entries": name}}, where="", folder=folder) for name in ("entries.txt", "copy.txt"))
    assert one.hash == copy.hash
    (folder / "copy.txt").write_text("other\n")
    assert RuleSet.parse({"a": rule | {"entries": str(folder / "copy.txt")}}, where="").hash != one.hash
    assert one.rules["a"].model_dump(mode="json")["entries"].startswith("blake2b:")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "balance", "entries": "nothing.txt", "per_entry": 5}, r"cannot read .*nothing\.txt: No such file"),
        ({"rule": "balance", "entries": "empty.txt", "per_entry": 5}, "the file of entries has none"),
        ({"rule": "balance", "entries": "latin.txt", "per_entry": 5}, "is not UTF-8 text"),
        ({"rule": "balance", "entries": ["cat"], "per_entry": 5}, "should be the path of a text file"),
        ({"rule": "balance", "entries": "entries.txt", "per_entry": 0}, "greater than 0"),
        (WEIGH | {"category": "genders"}, "no category 'genders'; did you mean 'gender'"),
        (WEIGH | {"target": {"woman": 0.5, "men": 0.5}}, "gender has no group 'woman'; did you mean 'women'"),
        (WEIGH | {"target": {"women": 0.5, "men": 0.6}}, r"add to 1\.1, not to 1"),
        (WEIGH | {"target": {"women": 1.5, "men": -0.5}}, "shares are above 0"),
        (WEIGH | {"terms": "entries.txt"}, "has a key `groups`"),
        (WEIGH | {"terms": "bad.yaml"}, "crosses name 'age', which is no category"),
        (WEIGH | {"terms": "none.yaml"}, "which is the name of those in no group"),
        (WEIGH | {"terms": "blank.yaml"}, "has a term without a letter"),
        (WEIGH | {"terms": "same.yaml"}, "two categories or more, each once"),
    ],
)
def test_what_is_not_valid_is_named(folder: Path, rule: dict[str, Any], message: str) -> None:
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "bad.yaml").write_text(GROUPS + "crosses: [[gender, age]]\n")
    (folder / "none.yaml").write_text("groups: {gender: {none: [x]}}\n")
    (folder / "blank.yaml").write_text("groups: {gender: {women: [' ']}}\n")
    (folder / "same.yaml").write_text(GROUPS + "crosses: [[gender, gender]]\n")
    with pytest.raises(ConfigError, match=message):
        RuleSet.parse({"it": rule}, where="rules.yaml", folder=folder)
