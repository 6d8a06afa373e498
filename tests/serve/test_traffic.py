"""Which model and version answers: by name, without one the first; of one session always the same version."""

from __future__ import annotations

import asyncio
import re

import pytest

from serve.facts import Version
from serve.measured import Measured
from serve.problems import InputError, UnavailableError
from serve.traffic import Share, Slot, Traffic, pick
from serve.upstream import Upstream
from tests.serve.test_lost import FACTS


def version(reference: str) -> Version:
    return Version(application=reference, reference=reference, facts=FACTS)


def slot(name: str, **percent: float) -> Slot:
    return Slot(name=name, shares=tuple(Share(version=version(reference), percent=share) for reference, share in percent.items()))


def choose(name: str | None, *slots: Slot) -> tuple[str, str]:
    upstream = Upstream(10, Measured(), lambda *_: asyncio.sleep(0))  # type: ignore[arg-type, return-value]
    upstream.follow(Traffic(slots=slots))
    found, chosen = upstream.choose(name, "a session")
    return found, chosen.reference


def test_several_models_are_chosen_by_name() -> None:
    slots = slot("photos@champion", one=100), slot("scenes", two=100), slot("scenes/3", three=100)
    assert choose(None, *slots) == ("photos@champion", "one")
    assert choose("photos@champion", *slots) == ("photos@champion", "one")
    assert choose("photos", *slots) == ("photos@champion", "one")
    assert choose("scenes", *slots) == ("scenes", "two")
    assert choose("scenes/3", *slots) == ("scenes/3", "three")
    with pytest.raises(InputError, match=r"'scene' is not served here.*scenes"):
        choose("scene", *slots)


def test_a_model_that_has_no_version_yet_is_not_answered_by_another() -> None:
    with pytest.raises(UnavailableError, match="being started"):
        choose("scenes", slot("photos", one=100), slot("scenes"))
    with pytest.raises(UnavailableError, match="being started"):
        choose(None)


def test_shares_are_kept_and_a_session_stays_with_one() -> None:
    both = slot("photos", one=90, two=10)
    found = [pick(both, f"session {i}").reference for i in range(2000)]
    assert 146 <= found.count("two") <= 254, "200, four standard deviations either way"
    assert [pick(both, f"session {i}").reference for i in range(200)] == found[:200]
    moved = slot("photos", one=80, two=20)
    stayed = {pick(moved, f"session {i}").reference for i, was in enumerate(found) if was == "two"}
    assert stayed == {"two"}, "a larger share moves no one back"
    assert {pick(slot("photos", one=0, two=100), f"session {i}").reference for i in range(50)} == {"two"}


def test_losses_are_counted_from_nothing() -> None:
    """Also before there is one: what begins at 1 has not risen, and raises no alert."""
    measured = Measured("a")
    counts = []
    for lost in (False, True, True):
        if lost:
            measured.lost("photos")
        measured.traffic(Traffic(slots=(slot("photos", one=100),)))
        counts += re.findall(r'mm_lost_copies_total\{gateway="a",model="photos"\} (\S+)', measured.page().decode())
    assert counts == ["0.0", "1.0", "2.0"]
