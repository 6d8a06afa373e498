"""Options that several commands have."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mm_core.data.among import Among
    from mm_core.data.index import Index
    from pipelines.registry import RegistryModels
    from pipelines.tracking import TrackingConfig

Json = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration value, e.g. optimizer.lr=1e-3.")
]
Ledgers = Annotated[list[str] | None, typer.Option("--ledger", help="Read only what this ledger keeps; give it again for several.")]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str) -> int:
    """`256MB`, `1.5G`, `1000000`: a number of bytes, units of 1000."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size:
        raise typer.BadParameter(f"{text!r} is no size: give a number of bytes, like 256MB or 1GB")
    return size


def opened_among(index: str, ledgers: Sequence[str] | None) -> tuple[Index, Among]:
    """What the argument `INDEX` or `INDEX#LEDGER,…` and the option --ledger stand for.

    Raises:
        DataError: there is no such index or ledger.
    """
    from mm_core.data.among import Among
    from mm_core.data.index import Index
    from mm_core.data.ledger import Source

    source = Source.parse(index, ledgers or ())
    opened = Index.open(source.index)
    return opened, Among.of(opened, source.ledgers)


def tracking_config(settings: Sequence[str] | None) -> TrackingConfig:
    """The tracking store that commands without a recipe use: `MM_SET__TRACKING__URI` and `--set tracking.…` change it."""
    from mm_core.config import Config, resolve
    from pipelines.tracking import TrackingConfig

    class _Only(Config):
        tracking: TrackingConfig = TrackingConfig()

    environment = {key: value for key, value in os.environ.items() if key.startswith("MM_SET__TRACKING__")}
    return resolve(_Only(), environment=environment, overrides=settings or ())[0].tracking.resolved()


def model_store(settings: Sequence[str] | None = None) -> RegistryModels:
    """What finds models: the registry of the environment and the settings."""
    from pipelines.registry import RegistryModels

    return RegistryModels(tracking_config(settings))
