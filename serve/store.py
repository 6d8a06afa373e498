"""Where models come from, as serving sees it: the command line hands in one that knows the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mm_core.address import absolute


class ModelStore(Protocol):
    """Sent to other processes: it must pickle."""

    def pin(self, reference: str) -> str:
        """The reference that means the same tomorrow: the version that an alias points at now.

        Raises:
            MMError: there is no such model, or the store does not answer.
        """

    def fetch(self, reference: str) -> str:
        """The checked folder on this machine, or the hub id.

        Raises:
            MMError: there is no such model, it is not what was registered, or the store does not answer.
        """


class Folders:
    """Folders and hub ids alone."""

    def pin(self, reference: str) -> str:
        return absolute(reference) if Path(reference).is_dir() else reference

    def fetch(self, reference: str) -> str:
        return reference
