"""A file that is a rule's parameter: its text travels with the rule to wherever that is judged, and stands for it in the rules' hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema

from mm_core.address import is_local
from mm_core.store import open_file


@dataclass(frozen=True, eq=False)
class TextFile:
    """What a file holds. Two of the same text are the same, wherever they lie."""

    text: str = field(repr=False)

    @cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextFile) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def read(cls, path: str, folder: Path | None = None) -> TextFile:
        """
        Args:
            folder: what a relative path starts from.

        Raises:
            ValueError: it cannot be read, or is not UTF-8.
        """
        url = str((folder or Path()) / path) if is_local(path) and not path.startswith("file://") else path
        try:
            with open_file(url, "rb") as file:
                return cls(file.read().decode("utf-8-sig"))
        except OSError as error:
            raise ValueError(f"cannot read {url}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{url} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _validate(value: Any, info: ValidationInfo) -> TextFile:
    if isinstance(value, TextFile):
        return value
    if not isinstance(value, str):
        raise ValueError("should be the path of a text file")
    return TextFile.read(value, (info.context or {}).get("folder"))


TextFileField = Annotated[
    TextFile,
    PlainValidator(_validate),
    PlainSerializer(lambda file: f"blake2b:{file.digest}", return_type=str),
    WithJsonSchema({"type": "string"}),
]
"""In a rule: the path of a file, from the folder of the file of rules."""
