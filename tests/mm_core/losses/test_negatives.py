"""Negatives: never the image's own words, by their similarity, and the same however the batch is divided."""

from __future__ import annotations

import torch

from mm_core.losses.negatives import draw_negatives, text_keys

IDS = torch.tensor([[5, 6, 0], [5, 7, 0], [6, 5, 0], [5, 6, 0], [9, 9, 9]])
"""The first and the fourth say the same."""


def test_keys_are_equal_where_texts_are() -> None:
    keys = text_keys(IDS)
    assert keys[0] == keys[3]
    assert len(set(keys.tolist())) == 4
    many = torch.randint(0, 5, (20_000, 12), generator=torch.Generator().manual_seed(0))
    assert len(set(text_keys(many).tolist())) == len(set(map(tuple, many.tolist())))


def test_they_are_drawn_by_similarity_among_other_texts() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0, 9.0, 2.0]]).repeat(30_000, 1)
    draws = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    rows = draw_negatives(logits, torch.zeros(30_000, dtype=torch.long), text_keys(IDS), draws).rows
    shares = torch.bincount(rows, minlength=5) / 30_000
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]).exp() * torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.01, rtol=0)


def test_a_share_of_them_is_any_other_text() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0, 9.0, 2.0]]).repeat(30_000, 1)
    draws = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    rows = draw_negatives(logits, torch.zeros(30_000, dtype=torch.long), text_keys(IDS), draws, hard=0.4).rows
    hard = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]).exp() * torch.tensor([0, 1, 1, 0, 1])
    expected = 0.4 * hard / hard.sum() + 0.6 * torch.tensor([0, 1, 1, 0, 1]) / 3
    torch.testing.assert_close(torch.bincount(rows, minlength=5) / 30_000, expected, atol=0.01, rtol=0)


def test_where_all_say_the_same_there_is_none() -> None:
    found = draw_negatives(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([7, 7, 7]), torch.tensor([0.0, 0.99])).found
    assert found.tolist() == [False, False]


def test_the_ends_of_the_draw() -> None:
    logits, keys = torch.zeros(2, 4), torch.tensor([1, 2, 3, 4])
    found = draw_negatives(logits, torch.tensor([0, 3]), keys, torch.tensor([0.0, 0.9999999]))
    assert found.rows.tolist() == [1, 2]
