"""Batches from host memory to the device, beside the step that runs there."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Transfer:
    """Copies arrays to one device: on a GPU from pinned memory on a stream of its own, so that a copy overlaps with the kernels of
    the step before, and the step that needs it waits on the device, not on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, values: NDArray[Any]) -> Tensor:
        host = torch.from_numpy(values)
        if self._stream is None:
            return host.to(self._device)
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = host.pin_memory().to(self._device, non_blocking=True)
        compute.wait_stream(self._stream)
        copied.record_stream(compute)
        return copied
