"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration value, e.g. optimizer.lr=1e-3.")
]
Ledgers = Annotated[list[str] | None, typer.Option("--ledger", help="Read only what this ledger keeps; give it again for several.")]
