"""The processes that evaluate, or write a checkpoint, together, so that none waits in a message that another never sends.

Guarantees: before each message all agree that none has failed, and else all raise. One process alone needs no process group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mm_core.errors import MMError, TrainingError


class OtherRankError(RuntimeError):
    """Another rank failed, with an error that is none of mm's own: a new start may mend it."""


class Ranks:
    """Of a process group, by default of that of all, where there is one."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None, *, work: str = "evaluation") -> None:
        """
        Args:
            device: of tensors that the group takes.
            work: what stops if one of them fails.
        """
        self.device, self._group, self._work = device, group, work
        grouped = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if grouped else (0, 1)

    def share(self, count: int) -> slice:
        """This rank's part of `count` things in a row; of fewer things than ranks some have none."""
        return slice(*(count * rank // self.size for rank in (self.rank, self.rank + 1)))

    def largest_share(self, count: int) -> int:
        return -(-count // self.size)

    def agree(self, error: BaseException | None, count: int = 0) -> int:
        """The largest `count` of all ranks. A collective.

        Raises:
            BaseException: `error`, on the rank it is of.
            TrainingError, OtherRankError: of the first rank that has one, on the others; the first if it is one of mm's own.
        """
        if self.size > 1:
            seen = torch.tensor([error is not None, count], device=self.device)
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._group)
            failed, count = seen.tolist()
            if failed:
                self._raise_theirs(error)
        if error is not None:
            raise error
        return count

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks, in rank order, on rank 0; elsewhere None. A collective."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, gathered, group=self._group)
        return gathered

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`. A collective."""
        if self.size == 1:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, group=self._group)
        return shared[0]

    def _raise_theirs(self, own: BaseException | None) -> None:
        errors: list[tuple[str, bool] | None] = [None] * self.size
        dist.all_gather_object(
            errors, None if own is None else (f"{type(own).__name__}: {own}", isinstance(own, MMError)), group=self._group
        )
        if own is None:
            rank, (word, is_ours) = next((rank, error) for rank, error in enumerate(errors) if error is not None)
            raise (TrainingError if is_ours else OtherRankError)(f"{self._work} stopped on rank {rank}: {word}")
