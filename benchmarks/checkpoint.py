"""How long a checkpoint holds training up, against one that is written before the next step: clip-vit-b32 and AdamW on gloo ranks.

One JSON line: GB of state, seconds that the step waits (median of the runs after the first), seconds that the thread writes, seconds of a
checkpoint that is waited for. `--folder` may be the URL of any store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mm_core.models.clip import build_clip, clip_vit_b32
from mm_core.models.sizes import SpecialTokens
from mm_core.training.checkpoint import CheckpointState
from mm_core.training.checkpoints import CheckpointFolder, CheckpointWriter, Retention


def rank(number: int, ranks: int, rendezvous: str, folder: str, runs: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/r", rank=number, world_size=ranks)
    torch.set_num_threads(1)
    model = build_clip(clip_vit_b32(), SpecialTokens(bos=49406, eos=49407, pad=0))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    writer = CheckpointWriter(CheckpointFolder(folder), model, optimizer, retention=Retention(keep=1))
    blocked: list[float] = []
    waited: list[float] = []
    written: list[float] = []
    for step in range(2 * runs):
        state = CheckpointState(
            step=step, chunks_consumed=0, plan_fingerprint="", data_fingerprint="", config={}, code_revision="", tracking_run_id=None
        )
        began, wait = time.perf_counter(), step >= runs
        writer.save(state, {}, wait=wait)
        (waited if wait else blocked).append(time.perf_counter() - began)
        writer.finish()
        written.append(writer.write_s)
    writer.close()
    if number == 0:
        size = sum(p.numel() for p in model.parameters()) * 12
        figures = {
            "state_gb": size / 1e9,
            "blocked_s": statistics.median(blocked[1:]),
            "first_blocked_s": blocked[0],
            "write_s": statistics.median(written),
            "waited_s": statistics.median(waited),
        }
        print(json.dumps({"benchmark": "checkpoint", "ranks": ranks} | {name: round(value, 3) for name, value in figures.items()}))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or f"{temporary}/run"
        mp.start_processes(rank, (arguments.ranks, temporary, folder, arguments.runs), nprocs=arguments.ranks, start_method="spawn")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
