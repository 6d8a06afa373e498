"""What a person sees of a command: stages, progress with rate and ETA, tables, and the one JSON line of `--json`.

Progress and notes go to standard error, results to standard output; with `--json` standard output ends with one JSON object.
Without a terminal, progress is a plain line every few seconds, so that logs stay readable.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_LINE_EVERY_S = 5.0
_LOG_WIDTH = 200


class Tracker:
    """Counts what is done and shows it; `note` is shown behind the rate, for example the current loss."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.note = ""
        self._started = time.monotonic()
        self._first: tuple[float, float] | None = None

    @property
    def rate(self) -> float:
        """Units per second since the first report, so that a slow start does not spoil the estimate; 0 as long as it is the only one."""
        if self._first is None:
            return 0.0
        done, at = self._first
        return (self.done - done) / max(time.monotonic() - at, 1e-9)

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        self.update(self.done + amount, note)

    def update(self, done: float, note: str | None = None) -> None:
        if self._first is None:
            self._first = (done, time.monotonic())
        self.done = done
        if note is not None:
            self.note = note
        self._show()

    def _show(self) -> None:
        """Overridden by the display."""

    def line(self) -> str:
        left = f"/{self.total:,.0f}" if self.total else ""
        rate = eta = ""
        if self.rate > 0:
            rate = f"  {self.rate:,.1f} {self.unit}/s"
            if self.total and self.done < self.total:
                eta = f"  ETA {_clock((self.total - self.done) / self.rate)}"
        note = f"  {self.note}" if self.note else ""
        return f"{self.label}  {self.done:,.0f}{left} {self.unit}{rate}{eta}{note}"


@dataclass
class Console:
    """The output of one command."""

    json: bool = False
    _out: RichConsole = field(init=False)
    _err: RichConsole = field(init=False)

    def __post_init__(self) -> None:
        self._err = _rich(sys.stderr)
        self._out = self._err if self.json else _rich(sys.stdout)

    def stage(self, title: str) -> None:
        self._err.print(f"\n[bold cyan]── {title}[/]")

    def note(self, text: str) -> None:
        """A line for the person who watches."""
        self._err.print(text, markup=False)

    def say(self, text: str) -> None:
        """A line of the command's result."""
        self._out.print(text, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None, *, lines: bool = False) -> None:
        """`lines`: between rows, for such as take several."""
        table = Table(*columns, title=title, title_justify="left", header_style="bold", show_lines=lines)
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        self._out.print(table)

    def result(self, values: Mapping[str, Any]) -> None:
        """With `--json`: the last line of standard output."""
        if self.json:
            sys.stdout.write(json.dumps(_finite(values), default=str, allow_nan=False) + "\n")
            sys.stdout.flush()

    @contextmanager
    def progress(self, label: str, total: float | None = None, unit: str = "samples") -> Iterator[Tracker]:
        if self._err.is_terminal:
            with _Noted(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(unit),
                TimeRemainingColumn(),
                console=self._err,
                refresh_per_second=4,
            ) as bar:
                yield _BarTracker(bar, label, total, unit)
        else:
            tracker = _LineTracker(self._err, label, total, unit)
            yield tracker
            tracker.finish()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for a number that is none."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.1f} {self._unit}/s")


class _Noted(Progress):
    """A bar, and below it a line of whatever belongs to it: beside it there is no room on a narrow terminal."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text(f"  {self.note}", no_wrap=True, overflow="ellipsis")


class _BarTracker(Tracker):
    def __init__(self, bar: _Noted, label: str, total: float | None, unit: str) -> None:
        super().__init__(label, total, unit)
        self._bar = bar
        self._task = bar.add_task(label, total=total)

    def _show(self) -> None:
        self._bar.note = self.note
        self._bar.update(self._task, completed=self.done, total=self.total)


class _LineTracker(Tracker):
    def __init__(self, console: RichConsole, label: str, total: float | None, unit: str) -> None:
        super().__init__(label, total, unit)
        self._console = console
        self._next = time.monotonic() + _LINE_EVERY_S
        self._shown = 0.0

    def _show(self) -> None:
        if time.monotonic() >= self._next and self.done > self._shown:
            self._next, self._shown = time.monotonic() + _LINE_EVERY_S, self.done
            self._console.print(self.line(), markup=False)

    def finish(self) -> None:
        self._console.print(f"{self.line()}  in {_clock(time.monotonic() - self._started)}", markup=False)


def _rich(stream: TextIO) -> RichConsole:
    """As wide as the terminal; without one, wide enough that no path in a table is cut."""
    return RichConsole(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else _LOG_WIDTH)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
