"""Which version of a model answers a request."""

from __future__ import annotations

import hashlib
import re

from pydantic import Field

from mm_core.config import Config
from serve.facts import Version


class Share(Config):
    version: Version
    percent: float


class Slot(Config):
    """One served model."""

    name: str
    shares: tuple[Share, ...] = Field(default=(), description="The versions that answer; none as long as none is up.")
    refused: str | None = Field(default=None, description="Why the version that should answer does not.")
    is_lost: bool = Field(default=False, description="Whether none of the versions has a copy that runs, for longer than requests wait.")


class Traffic(Config):
    """Who answers what, as the keeper decides and the gateways obey."""

    slots: tuple[Slot, ...] = ()
    searched: Version | None = Field(default=None, description="The version that the search index was made with.")

    @property
    def is_ready(self) -> bool:
        return bool(self.slots) and all(slot.shares and not slot.is_lost for slot in self.slots)

    def slot(self, name: str | None) -> Slot | None:
        """By its name, or what stands before `@` or `/` in it; the first where no name is given."""
        if name is None:
            return next(iter(self.slots), None)
        exact = next((slot for slot in self.slots if slot.name == name), None)
        return exact or next((slot for slot in self.slots if _base(slot.name) == name), None)


NOBODY = Traffic()
"""As long as nothing is known."""


def pick(slot: Slot, session: str) -> Version:
    """The version for a session: always the same one while the shares stay, since vectors of two versions cannot be compared."""
    draw = int.from_bytes(hashlib.blake2b(session.encode(), digest_size=8).digest(), "big") / 2**64 * 100
    for share in slot.shares:
        draw -= share.percent
        if draw < 0:
            return share.version
    return slot.shares[-1].version


def _base(name: str) -> str:
    return re.split(r"[@/]", name)[0]
