"""AdamW beside Muon, and the cosine beside a constant rate with a cooldown, at equally many samples.

    python -m benchmarks.optimisers [--recipe clip-tiny] [--steps 400] [--lr 1e-3 2e-3]

Each pair trains on the same drawn scenes, the same batches, with each learning rate, and is asked for the pictures and captions of
held-out ones. Prints one JSON line: the last loss and recall at 1 and 10 of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product

from benchmarks.command import mm

OPTIMISERS, SCHEDULES = ("adamw", "muon"), ("cosine", "wsd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="clip-tiny")
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 2e-3])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        mm("data", "synth", f"{folder}/corpus", "--samples", str(arguments.samples))
        mm("data", "index", f"{folder}/corpus/train", "--out", f"{folder}/index")
        common = [f"steps={arguments.steps}", f"storage={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        for optimiser, schedule, lr in product(OPTIMISERS, SCHEDULES, arguments.lr):
            name = f"{optimiser}-{schedule}-{lr}"
            chosen = [f"optimizer.kind={optimiser}", f"schedule.kind={schedule}", f"optimizer.lr={lr}"]
            settings = [word for value in common + chosen for word in ("--set", value)]
            trained = mm("train", arguments.recipe, "--data", f"{folder}/index", "--name", name, "--workers", "1", *settings)
            retrieval = mm("eval", trained["bundle"], "--retrieval", f"{folder}/corpus/heldout")["retrieval"]
            recalls = {key: round(retrieval[key], 3) for key in ("t2i_r1", "t2i_r10", "i2t_r1", "i2t_r10")}
            rows.append({"optimiser": optimiser, "schedule": schedule, "lr": lr, "loss": round(trained["final_loss"], 4)} | recalls)
    print(json.dumps({"benchmark": "optimisers", "recipe": arguments.recipe, "steps": arguments.steps, "rows": rows}))


if __name__ == "__main__":
    main()
