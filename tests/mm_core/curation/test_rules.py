from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mm_core.curation import rule
from mm_core.curation.picture import information, sharpness
from mm_core.curation.rows import Rows
from mm_core.curation.ruleset import RULES, RuleSet, schema
from mm_core.errors import ConfigError

MEMBERS = pa.list_(pa.struct([("suffix", pa.string()), ("size", pa.uint64())]))


def rows(captions: list[list[str]] | None = None, **columns: Any) -> Rows:
    if captions is not None:
        columns["captions"] = pa.array(captions, pa.list_(pa.string()))
    return Rows(pa.table(columns), {})


def kept(rule: dict[str, Any], some: Rows) -> list[bool]:
    return RuleSet.parse({"it": rule}, where="here").judge(some).judgements[0].keep.tolist()


def keeps_texts(rule: dict[str, Any], *texts: str) -> list[bool]:
    return kept(rule, rows([[text] for text in texts]))


def test_pictures_are_judged_by_their_columns() -> None:
    pictures = rows(
        width=pa.array([100, 640, 900, None], pa.uint32()),
        height=pa.array([300, 480, 200, None], pa.uint32()),
        image_format=["jpeg", "png", "jpeg", None],
        members=pa.array([[{"suffix": "jpg", "size": 30_000}], [{"suffix": "png", "size": 3072}], [], []], MEMBERS),
    )
    assert kept({"rule": "shorter_side", "min": 200}, pictures) == [False, True, True, False]
    assert kept({"rule": "aspect_ratio", "max": 3}, pictures) == [True, True, False, False]
    assert kept({"rule": "pixels", "max": 200_000}, pictures) == [True, False, True, False]
    assert kept({"rule": "bytes_per_pixel", "min": 0.05}, pictures) == [True, False, False, False]
    assert kept({"rule": "image_format", "formats": ["png", "webp"]}, pictures) == [False, True, False, False]
    assert kept({"rule": "pixels"}, pictures) == [True, True, True, True]


def test_captions_are_judged() -> None:
    assert keeps_texts({"rule": "characters", "min": 6}, "a cat", "a cat!") == [False, True]
    assert keeps_texts({"rule": "words", "min": 3, "max": 4}, "two words", "a b c", "a b c d e") == [False, True, False]
    assert keeps_texts({"rule": "alphanumeric", "min": 0.6}, "!!! ??? buy", "ein Hund läuft", "犬が走る") == [False, True, True]
    assert keeps_texts({"rule": "repeated_characters", "max": 3}, "wow!!!!", "a      b", "book") == [False, True, True]
    assert keeps_texts({"rule": "repeated_words", "max": 0.5}, "sale sale Sale", "the cat and the dog") == [False, True]


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((name, True) for name in ("IMG_0042.JPG", "DSC01234", "dscn 0012", "photo (12)", "red-shoes-final.jpg", "scan0001", "a1b2.webp")),
        *((text, False) for text in ("a photo of 2 cats", "the file is open", "image of a dog", "see a.jpg here", "route 66", "p 1")),
    ],
)
def test_names_of_files_are_no_captions(name: str, is_one: bool) -> None:
    assert keeps_texts({"rule": "file_name"}, name) == [not is_one]


def test_boilerplate_is_found_as_whole_words() -> None:
    rule = {"rule": "boilerplate", "phrases": ["click here", "stock photo"]}
    assert keeps_texts(rule, "Click  HERE to see", "stock photos of cats", "a Stock Photo.", "cat") == [False, True, False, True]
    assert keeps_texts(rule | {"match": "equals"}, "click here!", "click here to see") == [False, True]
    assert keeps_texts({"rule": "boilerplate", "phrases": ["c++ (new)"]}, "learn C++ (new) now", "learn c") == [False, True]


def test_languages_and_what_is_none() -> None:
    texts = ["a dog runs along the beach with a ball", "ein Hund läuft am Strand entlang", "un perro corre por la playa", "x7 q9"]
    rule = {"rule": "language", "languages": ["en", "de"]}
    judged = RuleSet.parse({"it": rule}, where="here").judge(rows([[text] for text in texts])).judgements[0]
    assert judged.keep.tolist() == [True, True, False, False]
    assert judged.labels is not None
    assert judged.labels.to_pylist()[:3] == ["en", "de", "es"]
    certain = rule | {"min_score": 1.0, "languages": ["unknown"]}
    assert keeps_texts(certain, "hm") == [True]


def test_every_caption_of_a_sample_must_be_kept_and_the_first_that_is_not_is_its_value() -> None:
    samples = rows([["one two three", "one"], ["one two three", "one two three four"], [], ["one", "one two"]])
    judged = RuleSet.parse({"it": {"rule": "words", "min": 3}}, where="here").judge(samples).judgements[0]
    assert judged.keep.tolist() == [False, True, True, False]
    np.testing.assert_array_equal(judged.values, [1, 3, np.nan, 1])


def test_the_first_rule_failed_is_the_reason_and_every_failure_is_a_bit() -> None:
    rules = RuleSet.parse({"short": {"rule": "words", "min": 2}, "few": {"rule": "characters", "min": 5}}, where="here")
    verdict = rules.judge(rows([["a b"], ["ab"], ["a b c"]]))
    assert (verdict.first.tolist(), verdict.fails.tolist()) == ([1, 0, -1], [2, 3, 0])


def test_the_hash_is_of_what_the_rules_say_and_not_of_how() -> None:
    one = RuleSet.parse({"a": {"rule": "words", "min": 3}, "b": {"rule": "file_name"}}, where="here")
    same = RuleSet.parse({"a": {"max": None, "min": 3.0, "rule": "words"}, "b": {"rule": "file_name"}}, where="elsewhere")
    turned = RuleSet.parse({"b": {"rule": "file_name"}, "a": {"rule": "words", "min": 3}}, where="here")
    other = RuleSet.parse({"a": {"rule": "words", "min": 4}, "b": {"rule": "file_name"}}, where="here")
    assert one.hash == same.hash
    assert len({one.hash, turned.hash, other.hash}) == 3


def test_the_hash_is_of_the_letters_that_a_rule_knows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python of another Unicode may take other characters for letters: the same rules are then others."""
    asks, not_at_all = ({"a": {"rule": name, "min": 3}} for name in ("words", "characters"))
    before = [RuleSet.parse(rules, where="here").hash for rules in (asks, not_at_all)]
    monkeypatch.setattr(rule, "UNICODE", "Unicode 3.2.0")
    after = [RuleSet.parse(rules, where="here").hash for rules in (asks, not_at_all)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_every_rule_about_text_says_what_it_looks_up() -> None:
    looked_up = {name: kind.model_construct().tables for name, kind in RULES.items()}
    assert {name for name, tables in looked_up.items() if tables.startswith("Unicode")} == {
        *("words", "alphanumeric", "repeated_characters", "repeated_words", "personal", "balance", "reweight")
    }
    assert {name for name, tables in looked_up.items() if tables and not tables.startswith("Unicode")} == {"boilerplate", "language"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": {"rule": "word", "min": 3}}, r"rule 'a': there is no rule 'word'; did you mean 'words'"),
        ({"a": {"rule": "words", "mim": 3}}, r"rule 'a': words has no parameter 'mim'; did you mean 'min'"),
        ({"a": {"rule": "words", "min": "many"}}, r"rule 'a'.*min: Input should be a valid number.*'many'"),
        ({"a": {"rule": "words", "min": 5, "max": 3}}, "min 5 is above max 3"),
        ({"a": {"rule": "sharpness", "min": 5, "top": 0.3}}, "give either top, or min and max"),
        ({"a": {"rule": "language"}}, "languages: Field required"),
        ({"a": {"min": 3}}, "does not say which rule it is"),
        ({"a": 3}, "does not say which rule it is"),
        ([], "is a mapping of names to rules"),
        (None, "is a mapping of names to rules"),
        ({str(i): {"rule": "words"} for i in range(65)}, "65 rules, above 64"),
    ],
)
def test_rules_that_are_not_valid_are_named(rules: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuleSet.parse(rules, where="rules.yaml")


def test_a_file_has_rules_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text("rules:\n  short: {rule: words, min: 3}\n")
    assert RuleSet.read(file).columns == ["captions"]
    file.write_text("rule:\n  short: {rule: words, min: 3}\n")
    with pytest.raises(ConfigError, match="unknown key 'rule'"):
        RuleSet.read(file)


def test_the_schema_has_every_rule_with_its_parameters_and_is_json() -> None:
    published = json.loads(json.dumps(schema()))
    for name, kind in RULES.items():
        described = published["$defs"][name]
        assert described["properties"]["rule"]["const"] == name
        assert set(described["properties"]) == set(kind.model_fields)
        assert described["additionalProperties"] is False
        assert "rule" in described["required"]


def test_sharp_and_plain_pictures() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    smooth = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    plain = np.full((64, 64), 7, dtype=np.uint8)
    assert sharpness(noise) > 1000 > sharpness(smooth) == sharpness(plain) == sharpness(plain[:2]) == 0
    assert information(plain) == 0
    assert information(smooth) == pytest.approx(6)
    assert information(np.arange(256, dtype=np.uint8)[None]) == pytest.approx(8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules:\n  a: {rule: words, min: 9}\n  a: {rule: words, min: 1}\n", "the key 'a' comes twice"),
        ("rules:\n  1: {rule: words, min: 9}\n  '1': {rule: words, min: 1}\n", "the key '1' comes twice"),
        ("rules:\n  a: {rule: words, min: .nan}\n", "finite number"),
        ("rules:\n  a: {rule: language, languages: [english]}\n", "'english' is no ISO 639 code"),
        ("rules:\n  a: {rule: image_format, formats: []}\n", "at least 1 item"),
        ("rules:\n  a: {rule: boilerplate, phrases: [' ', dog]}\n", "a phrase is blank"),
    ],
)
def test_what_would_silently_keep_or_drop_everything_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RuleSet.read(tmp_path / "rules.yaml")


def test_a_long_list_of_phrases_is_looked_for() -> None:
    rules = RuleSet.parse({"stock": {"rule": "boilerplate", "phrases": [f"phrase {n}" for n in range(5000)]}}, where="test")
    table = pa.table({"captions": pa.array([["a dog"], ["see phrase 4999 here"], ["phrase 17"]], pa.list_(pa.string()))})
    assert rules.judge(Rows(table, {})).judgements[0].keep.tolist() == [True, False, False]
