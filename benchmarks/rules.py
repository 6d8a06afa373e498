"""Samples/s of every rule on one core, over made-up captions and sizes; of `balance` with 1,000, 100,000 and 500,000 entries, counting and
judging apart.

python benchmarks/rules.py [--samples 500000]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mm_core.curation.rows import Rows
from mm_core.curation.ruleset import RULES, RuleSet
from mm_core.curation.score_rules import ScoreRule
from mm_core.curation.terms import Terms
from mm_core.data.scan import BATCH_ROWS

_WORDS = ("a", "man", "in", "red", "shirt", "runs", "über", "photo", "of", "the", "dog", "click", "here", "IMG_0123.jpg", "日本", "beach")
_PARAMETERS: dict[str, dict[str, Any]] = {
    "image_format": {"formats": ["jpeg"]},
    "boilerplate": {"phrases": ["click here", "stock photo", "image not available"]},
    "language": {"languages": ["en"]},
    "balance": {"entries": "entries.txt", "per_entry": 1000},
    "reweight": {"terms": "groups.yaml", "category": "gender", "target": {"women": 0.5, "men": 0.5}},
}
_GROUPS = "groups: {gender: {women: [woman, women, girl, she, her, beach], men: [man, men, boy, he, his]}}"
_ENTRIES = (1_000, 100_000, 500_000)


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


def batches(table: pa.Table) -> Iterator[Rows]:
    checks = np.arange(table.num_rows, dtype=np.uint64)
    for at in range(0, table.num_rows, BATCH_ROWS):
        yield Rows(table.slice(at, BATCH_ROWS), {}, checks[at : at + BATCH_ROWS])


def entries(count: int, rng: np.random.Generator) -> str:
    """One to three made-up words each, the first thousand of the words that captions have."""
    letters = rng.integers(97, 123, (count, 3, 6), dtype=np.uint8)
    words = [[bytes(word).decode() for word in row[: 1 + i % 3]] for i, row in enumerate(letters)]
    drawn = rng.integers(0, len(_WORDS), (1000, 3))
    known = [[_WORDS[j] for j in row[: 1 + i % 3]] for i, row in enumerate(drawn)]
    return "\n".join(" ".join(words) for words in [*known, *words][:count])


def balance_rates(folder: Path, table: pa.Table) -> dict[str, dict[str, float]]:
    """By the number of entries: seconds to compile them, samples/s of counting and of judging."""
    found = {}
    for count in _ENTRIES:
        (folder / "entries.txt").write_text(entries(count, np.random.default_rng(0)))
        rules = RuleSet.parse({"balance": {"rule": "balance"} | _PARAMETERS["balance"]}, where="balance", folder=folder)
        lines = (folder / "entries.txt").read_text().splitlines()
        started = time.perf_counter()
        Terms(lines)
        compiled = time.perf_counter()
        for rows in batches(table):
            rules.count(rows)
        counting = table.num_rows / (time.perf_counter() - compiled)
        found[str(count)] = {"compile_s": round(compiled - started, 2), "count": round(counting), "judge": round(rate(rules, table))}
    return found


def rate(rules: RuleSet, table: pa.Table) -> float:
    """Samples/s, the best of three."""
    rules = rules.settled(lambda asked: sum((asked.count(rows) for rows in batches(table)), start=np.zeros(1, dtype=np.int64)))
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for rows in batches(table):
            rules.judge(rows)
        best = max(best, table.num_rows / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500_000)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    table = made_up(arguments.samples)
    kinds = {name: {"rule": name} | _PARAMETERS.get(name, {}) for name, kind in RULES.items() if not issubclass(kind, ScoreRule)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "groups.yaml").write_text(_GROUPS)
        (folder / "entries.txt").write_text(entries(1000, np.random.default_rng(0)))
        rates = {
            name: round(
                rate(RuleSet.parse({name: rule}, where=name, folder=folder), table.slice(0, 50_000) if name == "language" else table)
            )
            for name, rule in kinds.items()
        }
        cheap = {name: rule for name, rule in kinds.items() if name not in ("language", "balance", "reweight")}
        together = round(rate(RuleSet.parse(cheap, where="all"), table))
        balance = balance_rates(folder, table)
    result = {"samples_per_s": rates, "column_rules_together_samples_per_s": together, "balance_by_entries": balance}
    print(json.dumps({"benchmark": "rules"} | result))


if __name__ == "__main__":
    main()
