"""Samples/s of every rule on one core, over made-up captions and sizes.

python benchmarks/rules.py [--samples 500000]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from mm_core.curation.rows import Rows
from mm_core.curation.ruleset import RULES, RuleSet
from mm_core.curation.score_rules import ScoreRule
from mm_core.data.scan import BATCH_ROWS

_WORDS = ("a", "man", "in", "red", "shirt", "runs", "über", "photo", "of", "the", "dog", "click", "here", "IMG_0123.jpg", "日本", "beach")
_PARAMETERS: dict[str, dict[str, Any]] = {
    "image_format": {"formats": ["jpeg"]},
    "boilerplate": {"phrases": ["click here", "stock photo", "image not available"]},
    "language": {"languages": ["en"]},
}


def made_up(samples: int) -> pa.Table:
    """Captions of 3 to 12 words, and the columns of pictures."""
    rng = np.random.default_rng(0)
    chosen, lengths = rng.integers(0, len(_WORDS), (samples, 12)), rng.integers(3, 13, samples)
    captions = [[" ".join(_WORDS[i] for i in row[:n])] for row, n in zip(chosen, lengths, strict=True)]
    member = pa.struct([("suffix", pa.string()), ("offset", pa.uint64()), ("size", pa.uint64())])
    members = [{"suffix": suffix, "offset": 512, "size": 20_000} for suffix in ("jpg", "txt", "json")]
    return pa.table(
        {
            "captions": pa.array(captions, pa.list_(pa.string())),
            "width": pa.array(rng.integers(50, 900, samples), pa.uint32()),
            "height": pa.array(rng.integers(50, 900, samples), pa.uint32()),
            "image_format": pa.array(["jpeg"] * samples),
            "members": pa.array([members] * samples, pa.list_(member)),
        }
    )


def rate(rules: RuleSet, table: pa.Table) -> float:
    """Samples/s, the best of three."""
    rules.judge(Rows(table.slice(0, BATCH_ROWS), {}))
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for at in range(0, table.num_rows, BATCH_ROWS):
            rules.judge(Rows(table.slice(at, BATCH_ROWS), {}))
        best = max(best, table.num_rows / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500_000)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    table = made_up(arguments.samples)
    kinds = {name: {"rule": name} | _PARAMETERS.get(name, {}) for name, kind in RULES.items() if not issubclass(kind, ScoreRule)}
    rates = {
        name: round(rate(RuleSet.parse({name: rule}, where=name), table.slice(0, 50_000) if name == "language" else table))
        for name, rule in kinds.items()
    }
    together = RuleSet.parse({name: rule for name, rule in kinds.items() if name != "language"}, where="all")
    print(json.dumps({"benchmark": "rules", "samples_per_s": rates, "all_but_language_samples_per_s": round(rate(together, table))}))


if __name__ == "__main__":
    main()
