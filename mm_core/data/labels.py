"""Whether the samples of an index have the classes that a model classifies them by."""

from __future__ import annotations

import numpy as np

from mm_core.data.index import Index
from mm_core.data.locators import HAS_LABEL
from mm_core.data.permutation import U64
from mm_core.errors import DataError


def check_labels(index: Index, ordinals: U64, num_classes: int | None = None, *, name: str | None = None) -> None:
    """Look at the samples at `ordinals`, which are in order, a batch of the index at a time.

    Args:
        num_classes: how many there are; None: any class will do.
        name: what errors call the index, where it is temporary.

    Raises:
        DataError: a sample has no class, or one that there is not.
    """
    name = name or index.url
    flags = index.locators["flags"][ordinals.astype(np.int64)]
    if unlabelled := int(((flags & HAS_LABEL) == 0).sum()):
        raise DataError(f"{unlabelled:,} samples of {name} have no class: each needs a .cls member beside its image or text")
    if num_classes is None:
        return
    first = highest = 0
    for batch in index.samples(["label"]):
        begin, end = np.searchsorted(ordinals, [first, first + batch.num_rows])
        of_kept = batch["label"].to_numpy(zero_copy_only=False)[(ordinals[begin:end] - np.uint64(first)).astype(np.int64)]
        highest, first = max(highest, int(of_kept.max(initial=0))), first + batch.num_rows
    if highest >= num_classes:
        raise DataError(
            f"{name} has samples of class {highest}, and objective.num_classes={num_classes} are told apart, 0 to {num_classes - 1}"
        )
