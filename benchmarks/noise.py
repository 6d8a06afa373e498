"""A noisy set, a model that scores it without having seen what it scores, and training on what is kept: does filtering pay?

    python -m benchmarks.noise SHARDS HELDOUT [--steps 500] [--recipe clip-tiny-photo]

SHARDS are real photos with captions. Of a copy of them 30 % of the samples get another one's captions, 5 % junk, and 5 % come twice. Then,
by the commands a person would give: two folds; a model on each; every pair scored by the model of the other fold (no pair by one that
trained on it); a ledger of duplicates, one of rules and the best-scored share; training on the noisy set and on the kept one, equally many
samples; retrieval on HELDOUT. Prints one JSON line: AUROC of right against wrong pairs, who was dropped, recall at 10 of both.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from benchmarks.command import mm
from mm_core.data.index import Index
from mm_core.data.ledger import Ledger
from mm_core.data.sample import Group, groups, read_group
from mm_core.data.scores import Scores
from mm_core.data.tar import walk
from pipelines.shards import expand_shards

_WRONG, _JUNK, _TWICE = 0.3, 0.05, 0.05
_JUNK_CAPTIONS = (
    "IMG_{n:04d}.jpg",
    "click here to buy",
    "photo photo photo photo photo",
    "image {n} of {n}",
    "DSC{n:05d}",
    "{n} {n} {n} {n}",
)
_RULES = """rules:
  junk_file:    {rule: file_name}
  junk_phrases: {rule: boilerplate, phrases: [click here]}
  repeated:     {rule: repeated_words, max: 0.5}
  few_words:    {rule: words, min: 3}
  letters:      {rule: alphanumeric, min: 0.6}
  similar:      {rule: similarity, scores: crossfit, top: 0.7}
"""


def read(shards: list[str]) -> list[tuple[bytes, list[str]]]:
    found = []
    for shard in shards:
        with open(shard, "rb") as stream:
            for group in groups(walk(stream, max_member_bytes=1 << 24)):
                if isinstance(group, Group):
                    sample = read_group(group, shard)
                    found.append((sample.image or b"", sample.captions))
    return found


def plant(samples: list[tuple[bytes, list[str]]], folder: Path, seed: int = 0) -> None:
    """The noisy copy; each sample's JSON says under `planted` what was done to it, which nothing but the figures reads."""
    draw = random.Random(seed)
    kinds = ["right"] * len(samples)
    chosen = draw.sample(range(len(samples)), round((_WRONG + _JUNK) * len(samples)))
    wrong, junk = chosen[: round(_WRONG * len(samples))], chosen[round(_WRONG * len(samples)) :]
    captions = [captions for _, captions in samples]
    for place, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        kinds[place], captions[place] = "wrong", samples[other][1]
    for place in junk:
        kinds[place], captions[place] = "junk", [draw.choice(_JUNK_CAPTIONS).format(n=draw.randrange(9999))]
    copied = draw.sample([place for place, kind in enumerate(kinds) if kind == "right"], round(_TWICE * len(samples)))
    for place in copied:
        kinds[place] = "copied"  # a copy may be in the fold of the model that scores it: neither counts as right or wrong
    rows = [(image, captions[place], kinds[place]) for place, (image, _) in enumerate(samples)]
    rows += [(samples[place][0], captions[place], "twice") for place in copied]
    draw.shuffle(rows)
    folder.mkdir(parents=True)
    for start in range(0, len(rows), 1000):
        with webdataset.TarWriter(str(folder / f"{start // 1000:05d}.tar")) as writer:
            for number, (image, texts, kind) in enumerate(rows[start : start + 1000], start):
                body = {"captions": texts, "planted": kind}
                if kind != "twice":  # a copy is a copy, uid aside
                    body["uid"] = f"{number:032x}"
                writer.write({"__key__": f"{number:06d}", "jpg": image, "json": json.dumps(body).encode()})


def planted(index: Index) -> np.ndarray[Any, np.dtype[np.str_]]:
    """By row of the index."""
    kinds = []
    for shard in index.shard_urls:
        with open(shard, "rb") as stream:
            for group in groups(walk(stream, max_member_bytes=1 << 24)):
                assert isinstance(group, Group)
                kinds.append(json.loads(group.members["json"].data or b"{}")["planted"])
    return np.array(kinds)


def auroc(right: np.ndarray[Any, Any], wrong: np.ndarray[Any, Any]) -> float:
    """The probability that a right pair scores above a wrong one (Mann and Whitney)."""
    order = np.argsort(np.concatenate([right, wrong]), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    return float((ranks[: len(right)].sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(wrong)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("heldout")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--recipe", default="clip-tiny-photo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plant(read(expand_shards([arguments.shards])), folder / "noisy")
        index, rules = str(folder / "index"), folder / "rules.yaml"
        rules.write_text(_RULES)
        mm("data", "index", str(folder / "noisy"), "--out", index)
        common = ["--workers", "2", "--set", f"steps={arguments.steps}", "--set", f"storage={folder}/runs"]
        common += ["--set", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        mm("data", "split", index, "--heldout", "0.5", "--names", "a,b")
        for fold in ("a", "b"):
            mm("train", arguments.recipe, "--data", index, "--ledger", fold, "--name", f"on-{fold}", *common)
        bundles = {fold: f"{folder}/runs/on-{fold}/bundle" for fold in ("a", "b")}
        mm("data", "score", index, "similarity", "--name", "crossfit", "--fold", f"a={bundles['b']}", "--fold", f"b={bundles['a']}")
        mm("data", "score", index, "hash")
        mm("data", "filter", index, "--rules", str(rules), "--name", "clean")
        mm("data", "dedup", index, "--ledger", "clean", "--method", "perceptual", "--distance", "2", "--name", "once")
        found = {}
        for name, ledgers in (("noisy", []), ("kept", ["--ledger", "once", "--ledger", "clean"])):
            trained = mm("train", arguments.recipe, "--data", index, *ledgers, "--name", name, *common)
            found[name] = mm("eval", trained["bundle"], "--retrieval", arguments.heldout)["retrieval"]
        opened = Index.open(index)
        kinds = planted(opened)
        scores = np.concatenate([t["similarity"].to_numpy() for t in Scores(opened, "crossfit").values.tables(["similarity"])])
        kept = {name: Ledger(opened, name).weights() > 0 for name in ("once", "clean")}
        both = kept["once"] & kept["clean"]
    result = {
        "benchmark": "noise",
        "recipe": arguments.recipe,
        "steps": arguments.steps,
        "samples": len(kinds),
        "auroc_wrong": round(auroc(scores[kinds == "right"], scores[kinds == "wrong"]), 3),
        "auroc_junk": round(auroc(scores[kinds == "right"], scores[kinds == "junk"]), 3),
        "kept_fraction": {kind: round(float(both[kinds == kind].mean()), 3) for kind in ("right", "wrong", "junk", "copied", "twice")},
        "noisy": {key: found["noisy"][key] for key in ("t2i_r10", "i2t_r10")},
        "kept": {key: found["kept"][key] for key in ("t2i_r10", "i2t_r10")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
