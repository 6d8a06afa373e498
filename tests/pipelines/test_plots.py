"""The plots are drawn from whatever a run holds; what they show is read back from their pixels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.plots import evaluation_curve, loss_curve, recall_bars, retrieval_gallery

BLUE, RED, GREEN = (33, 102, 172), (214, 96, 77), (46, 133, 64)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour)).all(axis=-1).sum())


def test_a_long_loss_curve_falls_to_the_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points = [(step, 5 * math.exp(-step / 100) + 0.1 * rng.normal()) for step in range(500)]
    picture = pixels(loss_curve({"contrastive": points}, tmp_path / "plots" / "loss.png"))
    ys, xs = np.nonzero((picture == np.array(BLUE)).all(axis=-1))
    legend = (xs > 0.7 * picture.shape[1]) & (ys < 0.2 * picture.shape[0])
    left, right = ys[xs < np.quantile(xs, 0.1)], ys[(xs > np.quantile(xs, 0.9)) & ~legend]
    assert left.mean() + 100 < right.mean()


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, math.nan), (2, 3.0)], [(s, math.nan) for s in range(60)]])
def test_a_short_broken_or_empty_curve_is_still_a_picture(points: list[tuple[int, float]], tmp_path: Path) -> None:
    assert pixels(loss_curve({"loss": points}, tmp_path / "loss.png")).std() > 0
    assert pixels(loss_curve({}, tmp_path / "none.png")).std() > 0


def test_bars_are_as_high_as_the_recall(tmp_path: Path) -> None:
    low = {f"{way}_r{k}": 0.1 for way in ("t2i", "i2t") for k in (1, 5, 10)}
    both = pixels(recall_bars(low | {"t2i_r10": 0.4}, tmp_path / "recall.png", chance=dict.fromkeys(low, 0.01)))
    assert count(both, BLUE) / count(both, RED) == pytest.approx((0.1 + 0.1 + 0.4) / 0.3, rel=0.15)


@pytest.mark.parametrize("metrics", [{}, {"t2i_r1": 1.0}, {"t2i_r1": math.nan, "i2t_r5": 0.0}])
def test_missing_recalls_are_said_not_drawn(metrics: dict[str, float], tmp_path: Path) -> None:
    assert pixels(recall_bars(metrics, tmp_path / "recall.png")).std() > 0


def test_the_gallery_frames_what_is_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [[rng.integers(0, 255, (40, 40 + 8 * i, 3), dtype=np.uint8) for i in range(5)] for _ in range(3)]
    queries = ["a red circle", "costs $5 or $x_{", "赤い円 " * 60]
    none = pixels(retrieval_gallery(queries, images, [[False] * 5] * 3, tmp_path / "none.png"))
    first = pixels(retrieval_gallery(queries, images, [[True] + [False] * 4] * 3, tmp_path / "first.png"))
    assert count(none, GREEN) == 0
    _, xs = np.nonzero((first == np.array(GREEN)).all(axis=-1))
    assert len(xs) > 1000
    assert xs.max() < first.shape[1] / 2


def test_fewer_images_than_columns_and_no_query_at_all(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    retrieval_gallery(["a", "b"], [[image, image], [image]], [[True, False], [True]], tmp_path / "ragged.png")
    retrieval_gallery([], [], [], tmp_path / "empty.png")
    assert pixels(tmp_path / "ragged.png").size
    assert pixels(tmp_path / "empty.png").size


def test_evaluations_are_drawn_beside_chance(tmp_path: Path) -> None:
    points = [(10, 0.1), (20, 0.4)]
    with_chance = pixels(evaluation_curve({"retrieval/t2i_r1": points}, tmp_path / "a.png", chance={"retrieval/t2i_r1": 0.05}))
    without = pixels(evaluation_curve({"retrieval/t2i_r1": points}, tmp_path / "b.png", chance={}))
    below = slice(int(0.7 * with_chance.shape[0]), int(0.85 * with_chance.shape[0]))  # of the first point, above the axis
    assert [int((picture[below, :, 2] > picture[below, :, 0] + 60.0).any(axis=0).sum()) > 200 for picture in (with_chance, without)] == [
        True,
        False,
    ]
