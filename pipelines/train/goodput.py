"""Where a run's wall time went, over all its restarts: how much of it trained the model, and what took the rest.

Pure bookkeeping, on the clock of one process that outlives the workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

START_UP, RESTART, REPLAYED = "start_up", "restart", "replayed"
"""Before the first step of a command; from the last report of a failed attempt to the first step of the next; steps taken once more."""
TRAINING = ("forward", "backward", "optimizer")
"""The phases that compute the model's updates."""


@dataclass
class Goodput:
    """Seconds by part. The parts add up to the wall time between `began` and the last report."""

    seconds: dict[str, float] = field(default_factory=dict)
    highest_step: int = 0
    """Steps that were reported, the lost ones too."""
    _at: float = 0.0
    _step: int = 0
    _attempts: int = 0

    @classmethod
    def of(cls, record: Mapping[str, object]) -> Goodput:
        """What `record` made."""
        seconds, highest = record.get("seconds", {}), record.get("highest_step", 0)
        assert isinstance(seconds, dict)
        assert isinstance(highest, int)
        return cls({str(part): float(value) for part, value in seconds.items()}, highest)

    def record(self) -> dict[str, object]:
        """For a later command that continues the run."""
        return {"seconds": dict(self.seconds), "highest_step": self.highest_step}

    def began(self, now: float) -> None:
        """A command has started workers."""
        self._at, self._attempts = now, 0

    def started(self, step: int, now: float) -> None:
        """The workers are about to take `step`."""
        self._add(RESTART if self._attempts else START_UP, now - self._at)
        self._at, self._step, self._attempts = now, step, self._attempts + 1

    def report(self, step: int, shares: Mapping[str, float], now: float) -> None:
        """Steps up to `step` are done since the last report, and their time divides as `shares`, which add up to 1."""
        passed, taken = now - self._at, max(1, step - self._step)
        again = min(taken, max(0, self.highest_step - self._step)) / taken
        self._add(REPLAYED, again * passed)
        for part, share in shares.items():
            self._add(part, (1 - again) * share * passed)
        self._at, self._step, self.highest_step = now, step, max(self.highest_step, step)

    def _add(self, part: str, seconds: float) -> None:
        if seconds > 0:
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def wall_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """Of the wall time what computed updates that were kept."""
        return sum(self.seconds.get(part, 0.0) for part in TRAINING) / max(self.wall_s, 1e-9)

    def mfu(self, while_stepping: float) -> float:
        """Over the whole wall time, from what it was on average while steps were taken."""
        lost = sum(self.seconds.get(part, 0.0) for part in (START_UP, RESTART, REPLAYED))
        return while_stepping * (1 - lost / max(self.wall_s, 1e-9))

    def rows(self) -> list[tuple[str, float, float]]:
        """(part, seconds, share), the largest first."""
        return [(part, s, s / self.wall_s) for part, s in sorted(self.seconds.items(), key=lambda item: -item[1])]

    def metrics(self) -> dict[str, float]:
        return {"goodput/fraction": self.fraction, "goodput/wall_s": self.wall_s} | {
            f"goodput/{part}_s": seconds for part, seconds in self.seconds.items()
        }
