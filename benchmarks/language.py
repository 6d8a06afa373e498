"""Accuracy of the language rule on captions of thirteen languages, and how much junk is called a language, at several floors of its score.

    python benchmarks/language.py

`language_captions.tsv` has 25 captions of each language, written for this: twenty as of photographs and shops, the same in all languages,
and five of one to four words. A caption is right where the rule with that floor gives it its language; below the floor it is `unknown`.
Junk is names of files, codes, prices, keyboard noise: right is `unknown`. Prints one JSON line.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from mm_core.curation.language import languages_of

_FLOORS = (0.0, 0.3, 0.5)
_EACH, _SHORT = 25, 5
"""Captions of a language; the last of them are short."""


def main() -> None:
    lines = (Path(__file__).parent / "language_captions.tsv").read_text(encoding="utf-8").splitlines()
    labels, texts = zip(*(line.split("\t", 1) for line in lines), strict=True)
    found, scores = languages_of(pa.array(texts))
    junk = np.array(labels) == "junk"
    is_short = np.arange(len(labels)) % _EACH >= _EACH - _SHORT
    by_floor = {}
    for floor in _FLOORS:
        right = (np.array(found.to_pylist()) == np.array(labels)) & (scores >= floor)
        by_language = {
            label: round(float(right[np.array(labels) == label].mean()), 2) for label in dict.fromkeys(labels) if label != "junk"
        }
        by_floor[str(floor)] = {
            "accuracy": round(float(right[~junk].mean()), 3),
            "sentences": round(float(right[~junk & ~is_short].mean()), 3),
            "short": round(float(right[~junk & is_short].mean()), 3),
            "by_language": by_language,
            "junk_called_a_language": round(float((scores[junk] >= floor).mean()), 3),
        }
    print(json.dumps({"benchmark": "language", "captions": int((~junk).sum()), "junk": int(junk.sum()), "by_floor": by_floor}))


if __name__ == "__main__":
    main()
