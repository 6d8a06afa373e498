from __future__ import annotations

import pyarrow as pa
import pytest

from mm_core.data.personal import PersonalKind, mask_personal, personal_in

EVERY = tuple(PersonalKind)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@mail.example.co.uk now", "write to [email] now"),
        ("call +49 30 901820 today", "call [phone] today"),
        ("call (212) 555-0147.", "call [phone]."),
        ("tel. 0171 234 5678", "tel. [phone]"),
        ("4111 1111 1111 1111 is a test card", "[card] is a test card"),
        ("378282246310005", "[card]"),
    ],
)
def test_personal_data_is_found_and_masked(text: str, masked: str) -> None:
    assert mask_personal(text, EVERY) == masked
    assert personal_in(pa.array([text, "a cat"]), EVERY).to_pylist() == [True, False]


@pytest.mark.parametrize(
    "text",
    [
        "a photo of 2019-08-21 10 am",
        "from 21.08.2019 on",
        "the years 1914-1918",
        "4111 1111 1111 1112",  # the check digit is wrong; sixteen digits are no telephone
        "1,234,567.89 dollars",
        "part 12345678 in red",
        "@artist at the beach",
        "0000 0000 0000 0000",
        "version 1.2.3.4",
    ],
)
def test_other_numbers_are_left(text: str) -> None:
    assert mask_personal(text, EVERY) == text
    assert personal_in(pa.array([text]), EVERY).to_pylist() == [False]


def test_only_what_is_asked_for() -> None:
    text = "a@b.org, +49 30 901820, 4111111111111111"
    assert mask_personal(text, (PersonalKind.PHONE,)) == "a@b.org, [phone], 4111111111111111"
    assert mask_personal(text, (PersonalKind.EMAIL, PersonalKind.CARD)) == "[email], +49 30 901820, [card]"


@pytest.mark.parametrize("address", ["josé@example.com", "josé@exämple.de", "имя@почта.рф"])
def test_addresses_of_any_script_are_masked(address: str) -> None:
    assert mask_personal(f"write to {address} now", [PersonalKind.EMAIL]) == "write to [email] now"
