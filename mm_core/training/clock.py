"""What a training loop's time goes to, on the device's own timeline.

Guarantees: the phases add up to the time between two readings; nothing waits for the device before `read`.
On a GPU a phase lies between two events of the compute stream. What the host or another stream does while kernels run takes none
of that time, so a phase shows what a step would gain without it.
"""

# No string annotations here: DDP compares those of its hooks with the types themselves.
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook


class Phase(StrEnum):
    DATA_WAIT = "data_wait"
    HOST_TO_DEVICE = "host_to_device"
    FORWARD = "forward"
    BACKWARD = "backward"
    COLLECTIVE = "collective"
    """What of the messages between ranks does not overlap with computing, the wait for the slowest rank included."""
    OPTIMIZER = "optimizer"
    LOGGING = "logging"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"
    OTHER = "other"


class StepClock:
    """One per rank. A moment is in one phase only: an inner phase's time is not its outer one's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Phase, float | torch.cuda.Event]] = []
        """The phase that began, and when."""
        self.enter(Phase.OTHER)

    @property
    def phase_now(self) -> Phase:
        """Of the thread that trains; may be read from another."""
        return self._marks[-1][0]

    def enter(self, phase: Phase) -> None:
        """Everything from here on is `phase`."""
        self._marks.append((phase, self._now()))

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        outer = self.phase_now
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def read(self) -> dict[Phase, float]:
        """Seconds in each phase since the last reading. Waits for the device."""
        now = self._now()
        if isinstance(now, torch.cuda.Event):
            now.synchronize()
        spent = dict.fromkeys(Phase, 0.0)
        ends = [moment for _, moment in self._marks[1:]] + [now]
        for (phase, start), end in zip(self._marks, ends, strict=True):
            spent[phase] += _seconds(start, end)
        self._marks = [(self._marks[-1][0], now)]
        return spent

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3
    assert isinstance(end, float)
    return end - start


def timed_all_reduce(clock: StepClock, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's own mean over ranks, as a communication hook that marks where backward has nothing left to compute.

    From the last bucket on, backward only waits for messages; those of earlier buckets overlap with computing.
    """
    if bucket.is_last():
        clock.enter(Phase.COLLECTIVE)
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is its default group
