"""What the seams between the stream's segments cost: images/s with many of them and with none, in turn.

    python -m benchmarks.seams SHARDS... [--images 20480] [--runs 3] [--blocks 6]

Nothing but the stream holds the ranks up, so a segment that came late would show as lost throughput. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.loader import CHUNK, RANKS, WARM_UP, make_spec, ours
from pipelines.batches import row_bytes
from pipelines.index import build_index
from pipelines.session import ray_session
from pipelines.shards import expand_shards
from pipelines.stream import StreamConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--images", type=int, default=20_480)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=6, help="of a segment")
    arguments = parser.parse_args()
    seams, none = StreamConfig(segment_blocks=arguments.blocks), StreamConfig(segment_blocks=arguments.images)
    with tempfile.TemporaryDirectory() as folder, ray_session():
        spec = make_spec(build_index(expand_shards(arguments.shards), str(Path(folder) / "index")), arguments.size)
        runs = [(ours(spec, arguments.images, seams), ours(spec, arguments.images, none)) for _ in range(arguments.runs)]
    chunks = arguments.images // CHUNK // RANKS * (WARM_UP - 1) // WARM_UP
    result = {
        "benchmark": "seams",
        "seams_of_a_rank": chunks // seams.chunks_per_block(CHUNK * row_bytes(1, arguments.size, *spec.text_shape)) // arguments.blocks,
        "images_per_s_with_seams": round(statistics.median(run[0] for run in runs)),
        "without": round(statistics.median(run[1] for run in runs)),
        "ratio": round(statistics.median(run[0] / run[1] for run in runs), 3),
        "runs": [[round(x) for x in run] for run in runs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
