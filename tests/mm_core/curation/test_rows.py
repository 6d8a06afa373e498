from __future__ import annotations

from itertools import groupby

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.curation.captions import Captions
from mm_core.curation.rows import Rows

CAPTION = st.text(st.sampled_from("aAbßü日1!. \t\n\u00a0-"), min_size=1, max_size=30)


@given(st.lists(st.lists(CAPTION, max_size=3), min_size=1, max_size=8), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_what_is_measured_of_all_at_once_is_what_python_finds_one_by_one(lists: list[list[str]], skipped: int) -> None:
    captions = Captions(pa.array([["left out"]] * skipped + lists, pa.list_(pa.string())).slice(skipped))
    texts = [text for some in lists for text in some]
    assert captions.owners.tolist() == [i for i, some in enumerate(lists) for _ in some]
    assert captions.lengths.tolist() == [len(text) for text in texts]
    assert captions.words.tolist() == [len(text.split()) for text in texts]
    np.testing.assert_allclose(captions.alphanumeric, [sum(map(str.isalnum, text)) / len(text) for text in texts])
    runs = [max((0 if c.isspace() else len(list(run)) for c, run in groupby(text)), default=0) for text in texts]
    assert captions.longest_run.tolist() == runs
    words = [[word.lower() for word in text.split()] for text in texts]
    np.testing.assert_allclose(captions.repeated_words, [1 - len(set(w)) / len(w) if w else 0 for w in words])


def test_the_size_of_a_picture_is_that_of_the_first_member_that_is_one() -> None:
    members = [
        [{"suffix": "txt", "size": 9}, {"suffix": "png", "size": 70}, {"suffix": "jpg", "size": 50}],
        [{"suffix": "txt", "size": 9}],
        None,
        [{"suffix": "webp", "size": 30}],
    ]
    schema = pa.list_(pa.struct([("suffix", pa.string()), ("size", pa.uint64())]))
    sizes = Rows(pa.table({"members": pa.array(members, schema)}), {}).image_bytes
    np.testing.assert_array_equal(sizes, [70, np.nan, np.nan, 30])
