"""Why a sample, or a place in a shard, cannot be used: counted under these reasons, never raised out of a job."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Every reason mm counts. `docs/data.md` explains each to users."""

    TRUNCATED = "truncated"
    """The shard ends inside a member, or without tar's end mark."""
    BAD_HEADER = "bad_header"
    """Bytes where a tar header should be; reading goes on at the next valid header."""
    UNSUPPORTED_MEMBER = "unsupported_member"
    """A link, device, sparse or compressed member, or a name without a suffix."""
    MEMBER_TOO_LARGE = "member_too_large"
    NO_IMAGE = "no_image"
    NO_TEXT = "no_text"
    EMPTY_IMAGE = "empty_image"
    NOT_AN_IMAGE = "not_an_image"
    """The header is of no format that is read (JPEG, PNG, WebP)."""
    TOO_MANY_PIXELS = "too_many_pixels"
    UNDECODABLE = "undecodable"
    """The header is good, the pixels are not."""
    BAD_JSON = "bad_json"
    BAD_TEXT = "bad_text"
    """The caption is not UTF-8."""
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
