"""Captions to token ids, with the `tokenizers` library alone, so that a read task need not import transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32
from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True)
class CaptionTokenizer:
    """A tokenizer as its JSON text, the form that travels to read tasks, with the length every caption is cut or padded to."""

    definition: str
    context_length: int
    pad_id: int
    pad_token: str

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.definition)
        tokenizer.enable_truncation(self.context_length)
        tokenizer.enable_padding(length=self.context_length, pad_id=self.pad_id, pad_token=self.pad_token)
        return tokenizer

    def __call__(self, captions: Sequence[str]) -> Int32[np.ndarray, "b l"]:
        return self._ids(self._tokenizer.encode_batch(list(captions)))

    def with_lengths(self, captions: Sequence[str]) -> tuple[Int32[np.ndarray, "b l"], Int32[np.ndarray, " b"]]:
        """Token ids, and how many of each caption's are no padding. An id cannot tell: CLIP pads with the mark that ends a text."""
        encoded = self._tokenizer.encode_batch(list(captions))
        return self._ids(encoded), np.asarray([sum(e.attention_mask) for e in encoded], dtype=np.int32)

    def with_words(self, captions: Sequence[str]) -> tuple[Int32[np.ndarray, "b l"], Int32[np.ndarray, "b l"]]:
        """Token ids, and the number of the word in its text that each token is of; -1 of marks and padding."""
        encoded = self._tokenizer.encode_batch(list(captions))
        words = [[-1 if word is None else word for word in e.word_ids] for e in encoded]
        return self._ids(encoded), np.asarray(words, dtype=np.int32).reshape(len(encoded), self.context_length)

    def _ids(self, encoded: Sequence[Encoding]) -> Int32[np.ndarray, "b l"]:
        return np.asarray([e.ids for e in encoded], dtype=np.int32).reshape(len(encoded), self.context_length)

    def words(self, text: str) -> list[str]:
        """The words that `with_words` counts, in lower case."""
        encoded = self._tokenizer.encode(text)
        spans: dict[int, tuple[int, int]] = {}
        for word, (start, end) in zip(encoded.word_ids, encoded.offsets, strict=True):
            if word is not None:
                first, last = spans.get(word, (start, end))
                spans[word] = min(first, start), max(last, end)
        return [text[start:end].strip().lower() for _, (start, end) in sorted(spans.items())]


TEMPLATE_MARK = "{c}"
"""Where a prompt template takes the caption: the mark of CLIP_benchmark's templates."""


def choose_captions(captions: Sequence[str], seed: int, count: int = 1, templates: Sequence[str] = ()) -> list[str]:
    """`count` of several captions, each in one of several prompt templates, drawn from `seed` alone. None comes
    twice before each has once."""
    if len(captions) == 1 and not templates:
        return [captions[0]] * count
    draw = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += draw.sample(captions, min(len(captions), count - len(chosen)))
    return [draw.choice(templates).replace(TEMPLATE_MARK, caption) for caption in chosen] if templates else chosen
