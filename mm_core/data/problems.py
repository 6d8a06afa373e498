"""Why a sample, or a place in a shard, cannot be used: counted under these reasons, never raised out of a job."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Every reason mm counts. `docs/data.md` explains each to users."""

    TRUNCATED = "truncated"
    """The shard ends inside a member, without tar's end mark, or in more zeros than pad a tar."""
    BAD_HEADER = "bad_header"
    """No tar header where one should be, or one that cannot be used (a name above 4 KB, say); reading goes on at the next valid header."""
    UNSUPPORTED_MEMBER = "unsupported_member"
    """A link, device, sparse or compressed member, a folder in a folder, or a name without a suffix."""
    MEMBER_TOO_LARGE = "member_too_large"
    """Above 256 MB, or text or JSON above 4 MB."""
    NO_IMAGE = "no_image"
    NO_TEXT = "no_text"
    EMPTY_IMAGE = "empty_image"
    NOT_AN_IMAGE = "not_an_image"
    """The header is of no format that is read (JPEG, PNG, WebP)."""
    TOO_MANY_PIXELS = "too_many_pixels"
    UNDECODABLE = "undecodable"
    """The header is good, the pixels are not."""
    TOO_MANY_OF_A_KEY = "too_many_of_a_key"
    """The 65,536th sample of one key in a shard, or a later one."""
    BAD_JSON = "bad_json"
    BAD_TEXT = "bad_text"
    """The caption is not Unicode, or the class no 32-bit number."""
    READ_FAILED = "read_failed"
    """The store did not answer after every retry."""
    CHANGED = "changed"
    """What was read is not what the index recorded."""


class SampleProblem(Exception):  # noqa: N818 - not an error of the program, a finding about the data
    """One sample cannot be used. `reason` is what it is counted under."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[SampleProblem], tuple[Reason, str]]:
        return SampleProblem, (self.reason, self.detail)
