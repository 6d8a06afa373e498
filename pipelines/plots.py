"""The pictures a run keeps beside its numbers: loss curve, recall bars, retrieval gallery. Each writes one PNG.

Figures are built without pyplot, so nothing here depends on a display, a backend setting or another figure.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

Points = Sequence[tuple[int, float]]
"""(step, value), by step."""

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#762a83", "#b35806", "#35978f")
_RIGHT, _WRONG = "#2e8540", "#cbd2d9"
_SMOOTH_FROM = 50
"""Points from which a smoothed line is drawn over the raw one."""
_K = (1, 5, 10)
_BAR = 0.36
_DASHED: dict[str, Any] = {"color": _INK, "linewidth": 1.2, "linestyle": (0, (3, 2))}


def time_bars(parts: Sequence[tuple[str, float, float]], path: Path) -> Path:
    """(name, seconds, share) of each part of a run's wall time as a bar, the largest on top."""
    figure = Figure(figsize=(8, 0.6 + 0.32 * len(parts)), layout="constrained")
    axes = figure.add_subplot()
    names = [name.replace("_", " ") for name, _, _ in parts]
    bars = axes.barh(names, [share for _, _, share in parts], color=_COLOURS[0], height=0.7)
    axes.bar_label(bars, [f"{share:.1%}   {seconds:,.0f} s" for _, seconds, share in parts], padding=4, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max((share for _, _, share in parts), default=1.0))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _style(axes)
    axes.set_xlabel("share of the wall time", color=_MUTED)
    return _write(figure, path)


def loss_curve(series: Mapping[str, Points], path: Path) -> Path:
    """Each named series over steps, smoothed where it is long, with its last value in the legend."""
    figure, axes = _curves(series)
    axes.set_ylabel("loss", color=_MUTED)
    return _write(figure, path)


def evaluation_curve(series: Mapping[str, Points], path: Path, *, chance: Mapping[str, float]) -> Path:
    """Recalls and accuracies over steps; what guessing gives, by the same names, is a dashed line in the series' colour."""
    figure, axes = _curves(series)
    for colour, name in zip(_cycle(len(series)), series, strict=True):
        if name in chance:
            axes.axhline(chance[name], **_DASHED | {"color": colour})
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("held out (dashed: chance)", color=_MUTED)
    return _write(figure, path)


def _curves(series: Mapping[str, Points]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, points) in zip(_cycle(len(series)), series.items(), strict=True):
        steps, values = np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)
        if not len(steps):
            continue
        if len(steps) >= _SMOOTH_FROM:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _smooth(values)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=f"{name}   {values[-1]:.4g}")
    _style(axes)
    axes.grid(axis="y", color=_GRID)
    axes.set_xlabel("step", color=_MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{int(step):,}"))
    if axes.lines:
        axes.legend(frameon=False, labelcolor=_INK)
    else:
        _note(axes, "no points were logged")
    return figure, axes


def recall_bars(metrics: Mapping[str, float], path: Path, *, chance: Mapping[str, float] | None = None) -> Path:
    """R@1, R@5 and R@10 both ways, from `t2i_r1` … `i2t_r10`; `chance`, by the same keys, is a dashed line."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for side, (way, label) in enumerate((("t2i", "text → image"), ("i2t", "image → text"))):
        centres = [i + (side - 0.5) * _BAR for i in range(len(_K))]
        values = [metrics.get(f"{way}_r{k}", math.nan) for k in _K]
        axes.bar(centres, values, 0.94 * _BAR, color=_COLOURS[side], label=label)
        for x, value in zip(centres, values, strict=True):
            _label(axes, x, value)
        if chance:
            ends = [(x - 0.47 * _BAR, x + 0.47 * _BAR) for x in centres]
            levels = [chance.get(f"{way}_r{k}", math.nan) for k in _K]
            for (left, right), level in zip(ends, levels, strict=True):
                axes.plot([left, right], [level, level], **_DASHED)
    if chance:
        axes.plot([], [], label="chance", **_DASHED)
    _style(axes)
    axes.grid(axis="y", color=_GRID)
    axes.set_xlim(-0.6, len(_K) - 0.4)
    axes.set_xticks(range(len(_K)), [f"R@{k}" for k in _K], color=_INK, fontsize=11)
    axes.tick_params(axis="x", length=0)
    highest = max((value for value in metrics.values() if math.isfinite(value)), default=0.0)
    axes.set_ylim(0, min(1.08, max(0.05, 1.2 * highest)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "chance")
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside upper left", ncols=3,
                  frameon=False, labelcolor=_INK)  # fmt: skip
    return _write(figure, path)


def retrieval_gallery(
    queries: Sequence[str],
    images: Sequence[Sequence[UInt8[np.ndarray, "h w 3"]]],
    correct: Sequence[Sequence[bool]],
    path: Path,
) -> Path:
    """A row per query: its text, then the images found, best first; the right ones are framed in green."""
    columns = max((len(found) for found in images), default=1)
    rows = max(len(queries), 1)
    figure = Figure(figsize=(3.1 + 1.55 * columns, 1.62 * rows + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)  # type: ignore[union-attr, call-arg]
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[2.0] + [1.0] * columns)
    for row, (query, found, flags) in enumerate(zip(queries, images, correct, strict=True)):
        caption = figure.add_subplot(grid[row, 0])
        caption.axis("off")
        text = caption.text(0.02, 0.5, _wrapped(query), va="center", color=_INK, fontsize=10, parse_math=False)
        text.set_in_layout(False)
        for column, (image, right) in enumerate(zip(found, flags, strict=True)):
            axes = figure.add_subplot(grid[row, column + 1])
            axes.imshow(image)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set(color=_RIGHT if right else _WRONG, linewidth=4 if right else 1)
            if row == 0:
                axes.set_title(f"{column + 1}", color=_MUTED, fontsize=9, pad=4)
    return _write(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a fiftieth of the curve, unbiased at its start; gaps where values are not finite."""
    keep = 1 - 1 / max(len(values) / 50, 2)
    mean = weight = 0.0
    smoothed = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
            smoothed[i] = mean / weight
    return smoothed


def _wrapped(query: str) -> str:
    """At most five lines of the query; characters of double width count as two."""
    wide = sum(east_asian_width(character) in "WF" for character in query)
    columns = 30 if wide < len(query) / 2 else 15
    return "\n".join(textwrap.wrap(query, columns, max_lines=5, placeholder=" …"))


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _style(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED)
    for name, side in axes.spines.items():
        side.set_visible(name == "bottom")
        side.set_color(_MUTED)


def _label(axes: Axes, x: float, value: float) -> None:
    """`value` on top of the bar at `x`."""
    missing = math.isnan(value)
    axes.annotate(
        "none" if missing else f"{value:.1%}",
        (x, 0 if missing else value),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=_MUTED if missing else _INK,
    )


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color=_MUTED, transform=axes.transAxes)


def _write(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # A script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(str(path))
    return path
