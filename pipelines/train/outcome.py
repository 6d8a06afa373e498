"""What a run returns to the driver. Light: Ray Train's controller, through which it passes, loads this and not the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ShardCount(NamedTuple):
    """Samples of one shard that were replaced for one reason."""

    shard: str
    reason: str
    samples: int


@dataclass(frozen=True)
class Outcome:
    """What rank 0 returns."""

    steps: int
    metrics: dict[str, float]
    failure: str | None = None
    failed_uids: tuple[str, ...] = ()
    """The samples of the batch that would have spoilt the model."""
    replaced: tuple[ShardCount, ...] = ()
    """The shards whose samples had to be replaced most often since the workers were started, the worst first."""
    taken_over: bool = False
    """Another command goes on with the run: its record and its MLflow run are that one's."""
