"""A batch in pieces beside the batch whole: the same loss curve, at which speed?

    python -m benchmarks.gradient_cache [--recipe clip-tiny] [--steps 60] [--pieces 64 32]

Drawn scenes; one run of `mm train` with the batch whole, one for each size of the pieces that it goes through the model in. Losses of every
step are read from MLflow. Prints one JSON line: the largest difference of any step's loss from the first run's, and samples/s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from mlflow.tracking import MlflowClient

from benchmarks.command import mm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="clip-tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pieces", type=int, nargs="+", default=[64, 32])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tracking = f"sqlite:///{folder}/mlflow.db"
        mm("data", "synth", f"{folder}/corpus", "--samples", "2000")
        mm("data", "index", f"{folder}/corpus/train", "--out", f"{folder}/index")
        common = [f"steps={arguments.steps}", "log_every_steps=1", f"storage={folder}/runs", f"tracking.uri={tracking}", "precision=fp32"]
        runs: dict[str, dict[str, Any]] = {}
        for pieces in ("null", *map(str, arguments.pieces)):
            settings = [word for value in (*common, f"parallel.micro_batch_size={pieces}") for word in ("--set", value)]
            done = mm("train", arguments.recipe, "--data", f"{folder}/index", "--name", f"pieces-{pieces}", "--workers", "1", *settings)
            history = MlflowClient(tracking).get_metric_history(done["run_id"], "loss")
            runs[pieces] = {"losses": [point.value for point in history], "samples_per_s": done["samples_per_s"]}
    whole = runs["null"]
    result = {
        "benchmark": "gradient_cache",
        "recipe": arguments.recipe,
        "steps": arguments.steps,
        "whole": {"first_loss": whole["losses"][0], "last_loss": whole["losses"][-1], "samples_per_s": whole["samples_per_s"]},
        "pieces": {
            size: {
                "largest_difference": max(abs(a - b) for a, b in zip(run["losses"], whole["losses"], strict=True)),
                "last_loss": run["losses"][-1],
                "samples_per_s": run["samples_per_s"],
            }
            for size, run in runs.items()
            if size != "null"
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
