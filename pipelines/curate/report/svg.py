"""Charts as SVG, to stand inside a page: pure functions of numbers. What is written in them is escaped, and a pointer that rests on a mark
reads its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from pipelines.curate.report.histogram import Histogram

KEPT, DROPPED = "#2166ac", "#c04a26"
CLUSTERS = ("#3b7d23", "#762a83", "#9a5b00", "#12767a", "#b3386e", "#4a5560", "#5b54c8", "#8a7a00")
"""None is that of kept or dropped."""
_INK, _MUTED, _GRID = "#1f2933", "#52606d", "#d9dee4"
_WIDTH, _HEIGHT = 420, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 34, 26
_LOG_COUNTS = 40
"""How many times one side's highest bar may be the other's, or a bar of the middle, before counts are drawn by their logarithm."""


def histogram(found: Histogram, name: str) -> Markup:
    """Kept samples above the line, dropped ones below it, with the thresholds across both."""
    logarithmic = log_counts(found)
    scale: Callable[[float], float] = (lambda count: math.log10(1 + count)) if logarithmic else float
    up, down = (scale(int(side.max(initial=0))) for side in found.counts.T)
    unit = (_HEIGHT - _TOP - _BOTTOM) / max(up + down, 1e-9)
    zero = _TOP + up * unit
    place = _placer(found)
    parts = [
        _grid(int(side.max(initial=0)), scale, zero, sign * unit, logarithmic) for side, sign in zip(found.counts.T, (-1, 1), strict=True)
    ]
    parts += [
        _bar(place(low), place(high), zero, counts, scale, unit, f"{_range(found, low, high)}: kept {counts[0]:,}, dropped {counts[1]:,}")
        for low, high, counts in zip(found.axis.edges[:-1], found.axis.edges[1:], found.counts.tolist(), strict=True)
        if sum(counts)
    ]
    parts.append(_line(_LEFT, zero, _WIDTH - _RIGHT, zero, _MUTED))
    parts += [_text(place(tick), _HEIGHT - 8, number(tick), "middle") for tick in _ticks_across(found)]
    parts += _marks(found, place)
    total = found.counts.sum(axis=0)
    return _svg(parts, _HEIGHT, f"Histogram of {name}: {total[0]:,} kept above the line, {total[1]:,} dropped below it")


def log_counts(found: Histogram) -> bool:
    """Whether counts differ too much to be seen side by side as they are."""
    peaks = [int(side.max()) for side in found.counts.T if side.any()]
    middle = float(np.median(found.counts[found.counts > 0])) if peaks else 1.0
    return bool(peaks) and max(peaks) > _LOG_COUNTS * min([*peaks, middle])


def beyond(found: Histogram) -> list[str]:
    """What lies past the ends of the axis, in words."""
    low, high = float(found.axis.edges[0]), float(found.axis.edges[-1])
    notes = [f"{name} {number(value)} lies beyond the axis" for name, value in found.marks if not low <= value <= high]
    if found.spread.low < low * (1 - math.copysign(1e-6, low)):
        notes.append(f"the first bar holds all below, down to {number(found.spread.low)}")
    if found.spread.high > high * (1 + math.copysign(1e-6, high)):
        notes.append(f"the last bar holds all above, up to {number(found.spread.high)}")
    return notes


def scatter(points: Iterable[tuple[float, float, str, str]], name: str, emphasised: Sequence[tuple[float, float, str]] = ()) -> Markup:
    """Points from 0 to 1 in both directions, each with its colour and what it says; and numbers written on some places."""
    side, edge = _WIDTH, 10
    parts = []
    for x, y, colour, says in points:
        at = f'cx="{edge + x * (side - 2 * edge):.1f}" cy="{edge + (1 - y) * (side - 2 * edge):.1f}"'
        parts.append(Markup(f'<circle {at} r="2.6" fill="{colour}"><title>{{}}</title></circle>').format(says))
    for x, y, label in emphasised:
        across, down = edge + x * (side - 2 * edge), edge + (1 - y) * (side - 2 * edge)
        parts.append(Markup(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="10" fill="#fff" stroke="{_INK}"/>'))
        parts.append(_text(across, down + 4, label, "middle", _INK))
    return _svg(parts, side, name)


def number(value: float) -> str:
    """Short, for an axis: 12, 0.35, 4.5k, 12M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.2g}"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within the ends: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _ticks_across(found: Histogram) -> list[float]:
    low, high = float(found.axis.edges[0]), float(found.axis.edges[-1])
    if not found.axis.logarithmic:
        return [tick for tick in ticks(low, high, 5) if not found.spread.whole or tick == int(tick)]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [times * 10.0**power for power in powers for times in ((1, 3) if len(powers) <= 4 else (1,))]
    inside = [tick for tick in fine if low <= tick <= high]
    return inside[:: -(-len(inside) // 6)] if inside else [low, high]


def _placer(found: Histogram) -> Callable[[float], float]:
    scale = math.log if found.axis.logarithmic else float
    low, high = scale(float(found.axis.edges[0])), scale(float(found.axis.edges[-1]))
    return lambda value: _LEFT + (scale(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _range(found: Histogram, low: float, high: float) -> str:
    if found.spread.whole and not found.axis.logarithmic:
        first, last = math.ceil(low), math.floor(high - 1e-9)
        return f"{first:,}" if first == last else f"{first:,} to {last:,}"
    return f"{number(low)} to {number(high)}"


def _bar(left: float, right: float, zero: float, counts: Sequence[int], scale: Callable[[float], float], unit: float, says: str) -> Markup:
    width = max(0.6, right - left - 0.8)
    up, down = (scale(count) * unit for count in counts)
    bars = f'<rect x="{left:.1f}" y="{zero - up:.1f}" width="{width:.1f}" height="{up:.1f}" fill="{KEPT}"/>' if counts[0] else ""
    bars += f'<rect x="{left:.1f}" y="{zero:.1f}" width="{width:.1f}" height="{down:.1f}" fill="{DROPPED}"/>' if counts[1] else ""
    target = f'<rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}" fill="transparent"/>'
    return Markup(f"<g><title>{{}}</title>{bars}{target}</g>").format(says)


def _grid(peak: int, scale: Callable[[float], float], zero: float, unit: float, logarithmic: bool) -> Markup:
    """Lines at round counts on one side of the zero line, with their numbers."""
    if not peak:
        return Markup("")
    levels = [10.0**power for power in range(int(math.log10(peak)) + 1)] if logarithmic else ticks(0, peak, 3)[1:] or [float(peak)]
    parts, last = [], zero
    for level in levels:
        if level != int(level) or abs((at := zero + scale(level) * unit) - last) < 14:
            continue
        last = at
        parts.append(_line(_LEFT, at, _WIDTH - _RIGHT, at, _GRID))
        parts.append(_text(_LEFT - 5, at + 4, number(level), "end"))
    return Markup("").join(parts)


def _marks(found: Histogram, place: Callable[[float], float]) -> list[Markup]:
    parts = []
    for row, (name, value) in enumerate(sorted(found.marks, key=lambda mark: mark[1])):
        if not found.axis.edges[0] <= value <= found.axis.edges[-1]:
            continue
        x, y = place(value), 12 + 14 * (row % 2)
        anchor = "start" if x < _LEFT + 40 else "end" if x > _WIDTH - _RIGHT - 40 else "middle"
        parts.append(_line(x, y + 4, x, _HEIGHT - _BOTTOM, _INK, ' stroke-dasharray="4 3" stroke-width="1.5"'))
        parts.append(_text(x, y, f"{name} {number(value)}", anchor, _INK))
    return parts


def _line(x: float, y: float, x2: float, y2: float, colour: str, more: str = "") -> Markup:
    return Markup(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>')


def _text(x: float, y: float, text: Any, anchor: str, colour: str = _MUTED) -> Markup:
    return Markup(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{{}}</text>').format(text)


def _svg(parts: Sequence[Markup], height: float, name: str) -> Markup:
    opening = Markup(f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{{}}">').format(name)
    return opening + Markup("").join(parts) + Markup("</svg>")
