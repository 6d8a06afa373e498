"""Scenes that `mm data synth` draws, captions and writes per second of one core.

    python benchmarks/synth.py [--samples 2000]

Counts processor time, so other work on the machine does not matter. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from mm_core.data.synth.corpus import SynthConfig, write_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    arguments = parser.parse_args()
    config = SynthConfig(samples=arguments.samples)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        write_shard(Path(folder) / "0.tar", "train", 0, arguments.samples, config)
        rate = arguments.samples / (time.process_time() - started)
    print(
        json.dumps({"benchmark": "synth", "samples": arguments.samples, "image_size": config.image_size, "samples_per_core_s": round(rate)})
    )


if __name__ == "__main__":
    main()
