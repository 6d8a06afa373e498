"""Memory and time of InfoNCE and of the sigmoid loss by batch size, beside the loss with the whole similarity matrix.

    python benchmarks/losses.py [--batches 1024 2048 … 65536] [--width 512] [--block-mb 64]

A figure is of one loss and its gradients: seconds, and the most memory that was held, less what the features and their gradients take. On a
processor each is a process of its own, so that its peak is known; on a GPU, where there is one, memory is the allocator's. Prints one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional

from mm_core.losses.contrastive import contrastive_loss
from mm_core.losses.sigmoid import sigmoid_loss

_MATRIX_LIMIT = 1 << (34 if torch.cuda.is_available() else 31)
"""Bytes of one similarity matrix above which the whole one is not tried."""


def naive_infonce(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits, labels = scale * image @ text.T, torch.arange(len(image), device=image.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def naive_sigmoid(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    labels = 2 * torch.eye(len(image), device=image.device) - 1
    return -functional.logsigmoid(labels * (scale * image @ text.T - 10)).sum() / len(image)


def measure(loss: str, batch: int, width: int, block_bytes: int) -> dict[str, float]:
    """The loss and its gradients, after a small one of the same kind, which loads what is loaded once."""
    _once(loss, 16, width, 1)
    return _once(loss, batch, width, block_bytes)


def measured_apart(loss: str, batch: int, width: int, block_mb: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", loss, str(batch), "--width", str(width), "--block-mb", str(block_mb)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def _once(loss: str, batch: int, width: int, block_bytes: int) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image, text = (functional.normalize(torch.randn(batch, width, device=device), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    image.grad, text.grad = torch.zeros_like(image), torch.zeros_like(text)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    before = _peak_bytes(device)
    started = time.perf_counter()
    match loss:
        case "infonce":
            contrastive_loss(image, text[:, None], image, text[:, None], scale, 0, block_bytes=block_bytes).backward()
        case "infonce_whole":
            naive_infonce(image, text, scale).backward()
        case "sigmoid":
            sigmoid_loss(image, text[:, None], scale, bias, batch, block_bytes=block_bytes).backward()
        case "sigmoid_whole":
            naive_sigmoid(image, text, scale).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - started, "mb": (_peak_bytes(device) - before) / 1e6}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1 << power for power in range(10, 17)])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--block-mb", type=int, default=64)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    block_bytes = arguments.block_mb << 20
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments.width, block_bytes)))
        return
    found: dict[str, dict[int, dict[str, float]]] = {}
    for batch in arguments.batches:
        for loss in ("infonce", "infonce_whole", "sigmoid", "sigmoid_whole"):
            if loss.endswith("whole") and 4 * batch**2 > _MATRIX_LIMIT:
                continue
            figures = (
                measure(loss, batch, arguments.width, block_bytes)
                if torch.cuda.is_available()
                else measured_apart(loss, batch, arguments.width, arguments.block_mb)
            )
            found.setdefault(loss, {})[batch] = {key: round(value, 4 if key == "seconds" else 1) for key, value in figures.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"benchmark": "losses", "device": device, "width": arguments.width, "block_mb": arguments.block_mb} | found))


if __name__ == "__main__":
    main()
