"""Scores: numbers measured of an index's samples that its columns do not hold, beside it and in its order.

    INDEX/scores/NAME/scores.json      what measured them, of which index
    INDEX/scores/NAME/values/*.parquet columns of numbers, or of vectors as fixed-width binary of little-endian float16; null where a
                                       sample is not usable or could not be read

Measuring goes on after a stop: a chunk that is there is not measured again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from mm_core.config import Config
from mm_core.data.index import Index
from mm_core.data.side_table import SideTable, check_name
from mm_core.errors import ConfigError, DataError
from mm_core.store import open_file, reaching, write_whole


class ScoresSummary(Config):
    """scores.json."""

    index_fingerprint: str
    kind: str = Field(description="What measured.")
    settings: dict[str, Any] = Field(description="With what.")
    among: str = Field(default="", description="The ledgers whose samples alone were measured, and their fingerprint; empty for all.")
    columns: tuple[str, ...] = Field(description="Columns of numbers.")
    vectors: dict[str, int] = Field(default_factory=dict, description="Columns of vectors, with their dimensions.")
    chunk_rows: int | None = Field(default=None, description="Rows of a file; null for 262,144.")
    unreadable: dict[str, int] = Field(default_factory=dict, description="Samples that could not be read or decoded, by reason.")
    complete: bool = False

    @property
    def fingerprint(self) -> str:
        """Of what was measured, and how."""
        text = json.dumps([self.index_fingerprint, self.kind, self.settings, self.among, self.columns], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Scores:
    """Scores of an index, by name."""

    index: Index
    name: str

    @property
    def url(self) -> str:
        return f"{self.index.url}/scores/{self.name}"

    @property
    def values(self) -> SideTable:
        """As long as nothing is begun, of no certain chunks."""
        summary = self.summary()
        return SideTable(f"{self.url}/values", self.index.summary.rows, summary.chunk_rows if summary else None)

    def summary(self) -> ScoresSummary | None:
        """None where there are none of this name.

        Raises:
            DataError: they are of another index, or cannot be read.
        """
        try:
            with reaching(self.url), open_file(f"{self.url}/scores.json", "rt") as file:
                summary = ScoresSummary.model_validate(json.load(file))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # of another version, or a store that did not answer: they are not ours to write over
            raise DataError(f"cannot read {self.url}/scores.json: {' '.join(str(error).split())[:200]}") from None
        if summary.index_fingerprint != self.index.summary.fingerprint:
            raise DataError(f"scores {self.name!r} were measured of another state of the index at {self.index.url}: remove {self.url}")
        return summary

    def complete(self, made_by: str) -> ScoresSummary:
        """
        Args:
            made_by: the arguments of `mm data score INDEX` that measure them.

        Raises:
            DataError: they are not there, or not all; the message has the command that makes them.
        """
        summary = self.summary()
        if summary is None or not summary.complete:
            state = "are not there; make them" if summary is None else "are not finished; to go on"
            raise DataError(f"scores {self.name!r} of {self.index.url} {state}: mm data score {self.index.url} {made_by}")
        return summary

    def begin(self, summary: ScoresSummary) -> ScoresSummary:
        """What is there already, else `summary`, which is written.

        Raises:
            ConfigError: there are others of this name, or it is no name.
        """
        check_name(self.name)
        found = self.summary()
        if found is not None and found.fingerprint != summary.fingerprint:
            raise ConfigError(
                f"{self.url} holds scores by other settings ({found.kind} {found.settings}{found.among}): give these another name, or"
                " remove it first"
            )
        if found is None:
            self.save(summary)
        return found or summary

    def save(self, summary: ScoresSummary) -> None:
        write_whole(f"{self.url}/scores.json", summary.model_dump_json(indent=1).encode())
