"""Masks: as much as was asked for, in blocks and whole words, the same whoever draws them, BEiT's by their statistics."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.flava.image_processing_pil_flava import FlavaMaskingGenerator

from mm_core.data.masking import Masking, MaskingConfig, block_masks, mask_words, uniform
from mm_core.data.permutation import mix
from mm_core.models.tokenizer import caption_tokenizer, mask_token, train_bpe

PAD, MASK, VOCAB = 0, 1, 1000


def seeds(count: int, key: int = 0) -> np.ndarray:
    return mix(key, np.arange(count, dtype=np.uint64))


def masking(config: MaskingConfig | None = None) -> Masking:
    return Masking(config or MaskingConfig(), grid=14, mask_id=MASK, pad_id=PAD, vocab_size=VOCAB)


def words_of(lengths: list[int], context: int = 30) -> np.ndarray:
    """A text whose words have so many tokens, between two marks."""
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    return np.array([-1, *numbers, *[-1] * (context - 1 - len(numbers))], dtype=np.int32)


def test_masks_are_beits_by_their_statistics() -> None:
    """Share hidden, and how often a neighbour of a hidden patch is hidden too, beside transformers' generator."""
    ours = block_masks(seeds(600), 14, MaskingConfig())
    random.seed(0)
    generate = FlavaMaskingGenerator(input_size=14, total_mask_patches=int(0.4 * 196), mask_group_min_patches=16)
    theirs = np.stack([generate().numpy().astype(bool) for _ in range(600)])

    def together(masks: np.ndarray) -> float:
        return float((masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, 1:].sum())

    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.01)
    assert together(ours) == pytest.approx(together(theirs), abs=0.02)
    assert together(ours) > 0.75  # where patches are drawn one by one it is their share, 0.4
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 0.15


@given(
    grid=st.integers(2, 16),
    share=st.floats(0.05, 0.95),
    least=st.integers(1, 40),
    aspect=st.floats(0.1, 1.0),
    key=st.integers(0, 2**63),
)
def test_something_is_hidden_and_no_more_than_the_share(grid: int, share: float, least: int, aspect: float, key: int) -> None:
    config = MaskingConfig(image_share=share, min_block=least, min_aspect=aspect)
    hidden = block_masks(seeds(5, key), grid, config).sum(axis=(1, 2))
    assert (hidden >= 1).all()
    assert (hidden <= max(1, int(share * grid**2))).all()


def test_a_mask_is_its_samples_alone() -> None:
    """The same whatever other samples are drawn with it."""
    whole = block_masks(seeds(20), 8, MaskingConfig(min_block=4))
    assert np.array_equal(whole[7:9], block_masks(seeds(20)[7:9], 8, MaskingConfig(min_block=4)))
    words = np.stack([words_of([1, 2, 1, 3, 1])] * 20)
    ids = np.arange(600, dtype=np.int32).reshape(20, 30) + 5
    one, few = mask_words(ids, words, seeds(20), masking()), mask_words(ids[3:5], words[3:5], seeds(20)[3:5], masking())
    assert np.array_equal(one.input_ids[3:5], few.input_ids)
    assert np.array_equal(one.hidden[3:5], few.hidden)
    assert len({tuple(row) for row in one.hidden}) > 3  # samples differ


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=7), share=st.floats(0.05, 0.9), key=st.integers(0, 2**63))
def test_words_are_hidden_whole(lengths: list[int], share: float, key: int) -> None:
    words = np.stack([words_of(lengths)] * 6)
    ids = np.full(words.shape, 7, dtype=np.int32)
    hidden = mask_words(ids, words, seeds(6, key), masking(MaskingConfig(text_share=share))).hidden
    wanted = max(1, round(share * sum(lengths)))
    for row in hidden:
        of_word = [row[words[0] == number] for number in range(len(lengths))]
        assert all(tokens.all() or not tokens.any() for tokens in of_word)
        chosen = [length for length, tokens in zip(lengths, of_word, strict=True) if tokens.any()]
        assert sum(chosen) >= min(wanted, sum(lengths))
        assert sum(chosen) < wanted + max(lengths)  # the last word alone goes beyond
    assert not hidden[words < 0].any()


def test_hidden_tokens_are_replaced_as_in_bert() -> None:
    words = np.stack([words_of([1] * 25)] * 2000)
    ids = np.full(words.shape, 7, dtype=np.int32)
    found = mask_words(ids, words, seeds(2000), masking())
    shown = found.input_ids[found.hidden]
    assert found.hidden.sum() / (words >= 0).sum() == pytest.approx(4 / 25)
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == 7).mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(found.input_ids[~found.hidden], ids[~found.hidden])
    assert not (shown == PAD).any()
    assert len(set(shown.tolist())) > 400


def test_a_tokenizers_words() -> None:
    tokenizer = train_bpe(["a red circle above a blue square"] * 3, vocab_size=300, context_length=16)
    light = caption_tokenizer(tokenizer, 16)
    ids, words = light.with_words(["a turquoise circle.", "a"])
    assert np.array_equal(ids, light(["a turquoise circle.", "a"]))
    of_text = words[0][words[0] >= 0]
    assert sorted(set(of_text.tolist())) == [0, 1, 2, 3]  # the full stop is a word of its own
    assert (of_text == 1).sum() > 2  # a word that the tokenizer does not know has many tokens
    assert words[1].tolist() == [-1, 0, *[-1] * 14]
    assert mask_token(tokenizer) == MASK


def test_no_samples_have_no_masks() -> None:
    assert masking().images(seeds(0)).shape == (0, 196)
    none = np.zeros((0, 30), dtype=np.int32)
    assert mask_words(none, none, seeds(0), masking()).hidden.shape == (0, 30)


def test_draws_are_uniform() -> None:
    drawn = uniform(3, np.arange(20_000, dtype=np.uint64))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.histogram(drawn, bins=10, range=(0, 1))[0].min() > 1850
