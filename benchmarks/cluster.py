"""What a token and TLS cost on a cluster, and how long after `mm submit` a run takes its first step.

    python -m benchmarks.cluster [--runs 2]

A head and a node of this machine by turns: open, behind a token (as mm starts them), and with TLS between the nodes besides. Each time:
round trips to an actor on the other node, tasks a second, an object from one node's store to the other's; then `mm submit -- train
clip-tiny` on drawn scenes, from the command to the first step's point in MLflow: as on this machine, and as to another one, with the code
sent along and each node looking at itself first. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient

from benchmarks.command import mm
from cluster.certificates import make_authority, make_node
from cluster.nodes import LocalCluster, Room

_CALLS = """
import json, statistics, sys, time
import numpy as np, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
nodes = {node["NodeName"]: On(node["NodeID"], soft=False) for node in ray.nodes()}

@ray.remote(num_cpus=0)
class Other:
    def nothing(self): return None
    def megabytes(self, count): return np.zeros(count << 20, np.uint8)
    def seconds(self, refs):
        began = time.perf_counter()
        assert ray.get(refs[0]).nbytes
        return time.perf_counter() - began

@ray.remote
def nothing(): return None

far, near = (Other.options(scheduling_strategy=nodes[name]).remote() for name in ("node1", "head"))
trips = []
for number in range(1500):
    began = time.perf_counter()
    ray.get(far.nothing.remote())
    trips.append(time.perf_counter() - began)
ray.get([nothing.remote() for _ in range(200)])
began = time.perf_counter()
ray.get([nothing.remote() for _ in range(2000)])
tasks = 2000 / (time.perf_counter() - began)
rates = []
for number in range(8):
    ref = far.megabytes.remote(64)
    ray.wait([ref], fetch_local=False)
    rates.append(64 / ray.get(near.seconds.remote([ref])))
print(json.dumps({"round_trip_us": 1e6 * statistics.median(trips[500:]), "tasks_per_s": tasks, "mb_per_s": statistics.median(rates[2:])}))
"""
"""Of a driver on the head."""


class OpenCluster(LocalCluster):
    """Whose nodes ask for nothing."""

    @property
    def variables(self) -> dict[str, str]:
        return super().variables | {"RAY_AUTH_MODE": "disabled"}


def measured(kind: str, work: Path, index: Path) -> dict[str, float]:
    """Of a cluster that is started for it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    if kind == "token_tls":
        if not (work / "ca").exists():
            make_authority(work / "ca")
        own |= make_node(work / "ca", work / "tls").environment
    cluster = (OpenCluster if kind == "open" else LocalCluster).new()
    try:
        cluster = cluster.add(Room(1, 200 << 20, 300 << 20), own)
        cluster.wait()
        cluster = cluster.add(Room(2, 2 << 30, 300 << 20), own)
        cluster.wait()
        environment = own | cluster.variables
        command = [sys.executable, "-c", _CALLS, cluster.gcs_address]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        found["submission_to_first_step_s"] = first_step(kind, work, index, environment)
        if kind != "open":  # to which no code is sent
            sent = ("--send-code", "--python", sys.executable)
            found["submission_with_code_to_first_step_s"] = first_step(kind, work, index, environment, *sent)
        return found
    finally:
        cluster.stop()


def first_step(kind: str, work: Path, index: Path, environment: dict[str, str], *options: str) -> float:
    """Seconds from the command to the end of the first step, as MLflow has it."""
    name = f"{kind}-{time.time_ns()}"
    tracking = f"sqlite:///{work}/mlflow.db"
    settings = [f"storage={work}/runs", f"tracking.uri={tracking}", "steps=3", "global_batch_size=32", "log_every_steps=1"]
    train = ["train", "clip-tiny", "--data", str(index), "--name", name, "--workers", "1"]
    command = [sys.executable, "-m", "mm", "submit", *options, "--", *train]
    command += [part for setting in settings for part in ("--set", setting)]
    began = time.time()
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
    job = [sys.executable, "-m", "mm", "jobs", "logs", "-f", f"{name}-1"]
    subprocess.run(job, env=environment, stdout=subprocess.DEVNULL, check=True)
    run_id = json.loads((work / "runs" / name / "run.json").read_text())["tracking_run_id"]
    points = MlflowClient(tracking).get_metric_history(run_id, "loss")
    return min(point.timestamp for point in points) / 1000 - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="Of each kind.")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"open": [], "token": [], "token_tls": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        mm("data", "synth", str(work / "corpus"), "--samples", "400")
        mm("data", "index", str(work / "corpus" / "train"), "--out", str(work / "index"))
        for _ in range(options.runs):
            for kind, rows in found.items():
                rows.append(measured(kind, work, work / "index"))
                print(json.dumps({kind: rows[-1]}), file=sys.stderr, flush=True)
    medians = {kind: {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]} for kind, rows in found.items()}
    print(json.dumps({"benchmark": "cluster", "runs": options.runs} | medians))


if __name__ == "__main__":
    main()
