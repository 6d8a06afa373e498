"""What `mm doctor` says of one thing: its state, what was seen, and what to do about it. Nothing secret is ever in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    """Works, but something a person may expect will not."""
    FAIL = "fail"
    """A command that needs this will stop with an error."""


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    evidence: str
    remedy: str = ""
    """Empty where there is nothing to do."""


def ok(name: str, evidence: str) -> Check:
    return Check(name, State.OK, evidence)


def warn(name: str, evidence: str, remedy: str) -> Check:
    return Check(name, State.WARN, evidence, remedy)


def fail(name: str, evidence: str, remedy: str) -> Check:
    return Check(name, State.FAIL, evidence, remedy)
