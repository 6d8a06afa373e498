from __future__ import annotations

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.curation.captions import Captions
from mm_core.curation.terms import Terms

TEXT = st.text(st.sampled_from("aAbß1 .-'日\u0301\t"), max_size=12)
WORDS = st.lists(st.sampled_from(["red", "shirt", "new", "york", ",", "."]), max_size=6).map(" ".join)


def captions(lists: list[list[str]]) -> Captions:
    return Captions(pa.array(lists, pa.list_(pa.string())))


def tokens(text: str) -> list[str]:
    found, inside = list[str](), False
    for char in text:
        joins = (char.isalnum() or unicodedata.category(char)[0] == "M") and char != "日"
        if joins and inside:
            found[-1] += char.lower()
        elif not char.isspace():
            found.append(char.lower())
        inside = joins
    return found


def has(text: str, term: str) -> bool:
    looked_for, there = tokens(term), tokens(text)
    return bool(looked_for) and any(there[i : i + len(looked_for)] == looked_for for i in range(len(there)))


def found(terms: Terms, lists: list[list[str]]) -> list[set[str]]:
    rows: list[set[str]] = [set() for _ in lists]
    for owner, term in zip(*terms.find(captions(lists)), strict=True):
        rows[owner].add(terms.texts[term])
    return rows


@given(st.lists(st.lists(TEXT, max_size=3), max_size=5), st.lists(TEXT, max_size=8))
@settings(deadline=None, max_examples=200)
def test_what_is_found_is_what_python_finds_text_by_text(lists: list[list[str]], given_terms: list[str]) -> None:
    terms = Terms(given_terms)
    assert found(terms, lists) == [{term for term in terms.texts if any(has(text, term) for text in texts)} for texts in lists]
    for text, term in zip(given_terms, terms.of_texts, strict=True):
        assert (term == -1) == (not tokens(text))
        assert term == -1 or tokens(terms.texts[term]) == tokens(text)


def spaced(text: str) -> str:
    """As MetaCLIP's `spacing`."""
    for sign in ",.;:?!`":
        text = text.replace(sign, f" {sign} ")
    return f" {text} "


@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS.filter(str.strip), min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_of_plain_lower_case_words_it_is_what_metaclip_finds(texts: list[str], entries: list[str]) -> None:
    entries = [entry for entry in entries if not set(entry) & set(",.")]
    terms = Terms(entries)
    theirs = [{term for term in terms.texts if f" {' '.join(term.split())} " in spaced(text)} for text in texts]
    assert all(some <= ours for some, ours in zip(theirs, found(terms, [[text] for text in texts]), strict=True))


@pytest.mark.parametrize(
    ("text", "term", "is_there"),
    [
        ("A WOMAN's hat", "woman", True),
        ("(women) and men", "women", True),
        ("mankind", "man", False),
        ("snowman", "man", False),
        ("a T-Shirt", "t-shirt", True),
        ("a t-shirt", "shirt", True),
        ("New\tYork, at night", "new  york", True),
        ("new, york", "new york", False),
        ("the U.S. flag", "U.S.", True),
        ("東京の海", "海", True),
        ("हिन्दी", "हिन", False),
    ],
)
def test_terms_are_whole_words_whatever_their_case(text: str, term: str, is_there: bool) -> None:
    assert found(Terms([term]), [[text]]) == [{term} if is_there else set()]


def test_a_term_does_not_reach_from_one_caption_into_the_next() -> None:
    assert found(Terms(["new york"]), [["brand new", "york"], ["new york"]]) == [set(), {"new york"}]
