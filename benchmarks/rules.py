"""Samples/s of every rule on one core, over made-up captions and sizes; of `balance` also with 1,000, 100,000 and 500,000 entries, counting
and judging apart; and of what rules read that `mm data score` measures: pictures, and heads over embeddings.

python -m benchmarks.rules [--samples 500000] [--shards SHARDS]

The captions of the first table have 16 words, and entries made of these: 11 entries in each, three times as many as MetaCLIP's metadata
finds (3.5 a caption, Xu et al. 2023). Those of `balance_by_entries` have 20,000 words, frequent and rare ones, and 2 to 5 entries each.
SHARDS have the pictures that are measured; without them none are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import curation_scale
from mm_core.curation.head import Between, Head, Output
from mm_core.curation.picture import measure_picture
from mm_core.curation.picture_hash import hash_picture
from mm_core.curation.rows import Rows
from mm_core.curation.ruleset import RULES, RuleSet
from mm_core.curation.terms import Terms
from mm_core.data.sample import Group, groups, read_group
from mm_core.data.scan import BATCH_ROWS
from mm_core.data.tar import walk
from pipelines.shards import expand_shards

_WORDS = ("a", "man", "in", "red", "shirt", "runs", "über", "photo", "of", "the", "dog", "click", "here", "IMG_0123.jpg", "日本", "beach")
_PARAMETERS: dict[str, dict[str, Any]] = {
    "image_format": {"formats": ["jpeg"]},
    "boilerplate": {"phrases": ["click here", "stock photo", "image not available"]},
    "language": {"languages": ["en"]},
    "balance": {"entries": "entries.txt", "per_entry": 1000},
    "reweight": {"terms": "groups.yaml", "category": "gender", "target": {"women": 0.5, "men": 0.5}},
    "sharpness": {"min": 0.5},
    "information": {"top": 0.5},
    "similarity": {"top": 0.5},
    "score": {"scores": "made_up", "top": 0.5},
}
_SCORES = {"image": ["sharpness", "information"], "similarity": ["similarity"], "made_up": ["score"]}
_GROUPS = "groups: {gender: {women: [woman, women, girl, she, her, beach], men: [man, men, boy, he, his]}}"
_ENTRIES = (1_000, 100_000, 500_000)
_PICTURES = 2000


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
    values = pa.array(np.random.default_rng(0).random(table.num_rows, dtype=np.float32))
    scores = {name: pa.table(dict.fromkeys(columns, values)) for name, columns in _SCORES.items()}
    for at in range(0, table.num_rows, BATCH_ROWS):
        of_batch = {name: some.slice(at, BATCH_ROWS) for name, some in scores.items()}
        yield Rows(table.slice(at, BATCH_ROWS), of_batch, checks[at : at + BATCH_ROWS])


def entries(count: int, rng: np.random.Generator) -> str:
    """One to three made-up words each, the first thousand of the words that captions have."""
    letters = rng.integers(97, 123, (count, 3, 6), dtype=np.uint8)
    words = [[bytes(word).decode() for word in row[: 1 + i % 3]] for i, row in enumerate(letters)]
    drawn = rng.integers(0, len(_WORDS), (1000, 3))
    known = [[_WORDS[j] for j in row[: 1 + i % 3]] for i, row in enumerate(drawn)]
    return "\n".join(" ".join(words) for words in [*known, *words][:count])


def frequent_and_rare(count: int, rng: np.random.Generator) -> str:
    """Every second word that captions have, pairs of them, and words they lack."""
    words = np.array(curation_scale.words())
    single = list(words[::2][: count // 2])
    pairs = words[(len(words) * rng.random(((count - len(single)) // 2, 2)) ** 2).astype(int)]
    letters = rng.integers(97, 123, (count - len(single) - len(pairs), 7), dtype=np.uint8)
    return "\n".join([*single, *map(" ".join, pairs), *(bytes(word).decode() for word in letters)])


def balance_rates(folder: Path, samples: int) -> dict[str, dict[str, float]]:
    """By the number of entries: seconds to compile them, entries of a caption, samples/s of counting and of judging."""
    found, table = {}, curation_scale.made_up(0, samples, pa.array(curation_scale.words())).select(["captions"])
    for count in _ENTRIES:
        (folder / "entries.txt").write_text(frequent_and_rare(count, np.random.default_rng(0)))
        rules = RuleSet.parse({"balance": {"rule": "balance"} | _PARAMETERS["balance"]}, where="balance", folder=folder)
        lines = (folder / "entries.txt").read_text().splitlines()
        started = time.perf_counter()
        terms = Terms(lines)
        compiled = time.perf_counter()
        for rows in batches(table):
            rules.count(rows)
        counting = table.num_rows / (time.perf_counter() - compiled)
        pairs = sum(len(rows.find(terms).terms) for rows in batches(table)) / table.num_rows
        found[str(count)] = {"compile_s": round(compiled - started, 2), "entries_of_a_caption": round(pairs, 1)}
        found[str(count)] |= {"count": round(counting), "judge": round(rate(rules, table))}
    return found


def picture_rates(shards: str) -> dict[str, float]:
    """Pictures/s of one process that has their bytes: sharpness and information together, and the hashes that duplicates are found by."""
    pictures = list[bytes]()
    for shard in expand_shards([shards]):
        with open(shard, "rb") as stream:
            found = [read_group(group, shard).image for group in groups(walk(stream, max_member_bytes=1 << 24)) if isinstance(group, Group)]
            pictures += [picture for picture in found if picture is not None]
        if len(pictures) >= _PICTURES:
            break
    rates = {"pictures": float(len(pictures[:_PICTURES]))}
    for name, measure in (("sharpness_and_information", measure_picture), ("hash", hash_picture)):
        started = time.perf_counter()
        for picture in pictures[:_PICTURES]:
            measure(picture)
        rates[name] = round(len(pictures[:_PICTURES]) / (time.perf_counter() - started))
    return rates


def head_rates(rows: int = 1 << 13) -> dict[str, float]:
    """Samples/s of heads over embeddings of 512 and 768 numbers: one layer, and the five of LAION's aesthetic predictor."""
    rng = np.random.default_rng(0)
    rates: dict[str, float] = {}
    for name, widths in {"512_to_1": (512, 1), "768_in_5_layers": (768, 1024, 128, 64, 16, 1)}.items():
        layers = [(rng.normal(size=(b, a)).astype(np.float32), np.zeros(b, np.float32)) for a, b in pairwise(widths)]
        head, vectors = Head(tuple(layers)), rng.normal(size=(rows, widths[0])).astype(np.float16)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            head(vectors.astype(np.float32), Between.IDENTITY, Output.IDENTITY)
            times.append(time.perf_counter() - started)
        rates[name] = round(rows / min(times))
    return rates


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
    parser.add_argument("--shards")
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    table = made_up(arguments.samples)
    kinds = {name: {"rule": name} | _PARAMETERS.get(name, {}) for name in RULES}
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
        balance = balance_rates(folder, arguments.samples)
    result = {"samples_per_s": rates, "column_rules_together_samples_per_s": together, "balance_by_entries": balance}
    result |= {"head_samples_per_s": head_rates()} | ({"pictures_per_s": picture_rates(arguments.shards)} if arguments.shards else {})
    print(json.dumps({"benchmark": "rules"} | result))


if __name__ == "__main__":
    main()
