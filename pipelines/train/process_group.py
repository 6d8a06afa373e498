"""How the ranks' process group ends where one of them hangs: at once. Train's controller loads this, so it is small.

Ray Train (2.60) waits for each rank to leave the group (`TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S`, 30 s), then five seconds more to let
it clean up; a process that is stopped does neither, and the others begin again only after both. That variable says nothing here.
"""

from __future__ import annotations

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _shutdown_torch, _TorchBackend
from ray.train.v2._internal.execution.worker_group import ExecutionGroup

_LEAVE_S = 2.0
"""A rank's train function is over by then, or lost: all that it had to say is said."""


class ProcessGroupConfig(TorchConfig):
    """torch.distributed for a run's ranks."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _EndsHanging


class _EndsHanging(_TorchBackend):
    """Ends the process of a rank that does not leave its group."""

    def on_shutdown(self, worker_group: ExecutionGroup, backend_config: BackendConfig) -> None:
        leaving = worker_group.execute_async(_shutdown_torch, destroy_process_group=len(worker_group) > 1)
        _, hanging = ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVE_S)
        for worker, left in zip(worker_group.get_workers(), leaving, strict=True):
            if left in hanging:
                ray.kill(worker.actor)
