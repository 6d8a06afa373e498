"""Personal data in captions: e-mail addresses, phone numbers, numbers of payment cards; finding and masking them.

Few captions hold any: one vectorised search picks those that could, and only these are looked at one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class PersonalKind(StrEnum):
    EMAIL = "email"
    PHONE = "phone"
    CARD = "card"


_CANDIDATE = r"@|\d(?:[ ().+/-]{0,3}\d){6}"
"""RE2. Whatever the patterns below find, this finds."""
_EMAIL = re.compile(r"[\w.%+-]+@(?:[\w-]+\.)+[^\W\d_]{2,24}\b")
_NUMBER = re.compile(r"(?<![\w.,/-])\+?\(?\d(?:[ ().+/-]{0,3}\d){6,18}\)?(?![\w/-]|[.,]\d)")
_DATE = re.compile(r"(?:\d{4}[ ./-]\d{1,2}[ ./-]\d{1,2}|\d{1,2}[ ./-]\d{1,2}[ ./-]\d{4})(?:\D|$)|(?:19|20)\d\d ?[-/] ?(?:19|20)\d\d$")
_CARD_DIGITS, _PHONE_DIGITS = range(13, 20), range(7, 16)


def personal_in(texts: pa.StringArray, kinds: Sequence[PersonalKind]) -> pa.BooleanArray:
    """Which texts hold something of `kinds`."""
    found = np.zeros(len(texts), dtype=bool)
    candidates = np.flatnonzero(pc.match_substring_regex(texts, _CANDIDATE).to_numpy(zero_copy_only=False))
    for i, text in zip(candidates, texts.take(pa.array(candidates)).to_pylist(), strict=True):
        found[i] = mask_personal(text, kinds) != text
    return pa.array(found)


def mask_personal(text: str, kinds: Sequence[PersonalKind]) -> str:
    """`text` with `[email]`, `[phone]` or `[card]` in the place of what is of `kinds`."""
    if PersonalKind.EMAIL in kinds:
        text = _EMAIL.sub("[email]", text)

    def mask(match: re.Match[str]) -> str:
        kind = _kind_of_number(match.group())
        return f"[{kind}]" if kind in kinds else match.group()

    return _NUMBER.sub(mask, text)


def _kind_of_number(number: str) -> PersonalKind | None:
    digits = re.sub(r"\D", "", number)
    if len(digits) in _CARD_DIGITS and _luhn(digits):
        return PersonalKind.CARD
    if len(digits) not in _PHONE_DIGITS or _DATE.match(number):
        return None
    # Digits in a row are a price, a year or an article number as often as a telephone: those with a country code or groups are taken.
    grouped = len(re.findall(r"\d+", number)) >= 3 or (len(digits) >= 10 and len(re.findall(r"\d+", number)) == 2)
    return PersonalKind.PHONE if number.startswith("+") or grouped else None


def _luhn(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1, annex B)."""
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(map(int, digits[::-2])) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0
