"""The training run that a submitted command is about: by its name submitting twice is submitting once, and submitting again goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import PurePath

from mm_core.errors import ConfigError

_RECIPE_CHARACTERS = 80
"""Of a name made here: with the time behind it, fewer than a run's may have."""
LABEL = "mm.run"
"""Of jobs, in Ray's metadata."""


def named(arguments: Sequence[str], now: datetime) -> list[str]:
    """A `train` command with a name, and so that it continues the run of that name if there is one. Other commands as they are.

    Raises:
        ConfigError: it would continue a run without naming it, so that two such jobs could train the same.
    """
    if not is_training(arguments):
        return list(arguments)
    found = list(arguments)
    if run_of(found) is None and "--resume" in found:
        raise ConfigError("--resume without --name: name the run, so that it has one job at a time")
    if run_of(found) is None:
        found += ["--name", f"{_recipe(found)}-{now:%Y%m%d-%H%M%S}"]
    if run_of(found) is not None and not {"--resume", "--or-resume"} & set(found):
        found.append("--or-resume")
    return found


def run_of(arguments: Sequence[str]) -> str | None:
    """The run's name, where a `train` command gives one; of several the last, as the program takes it."""
    if not is_training(arguments):
        return None
    name = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == "--name":
            name = following
        elif argument.startswith("--name="):
            name = argument.removeprefix("--name=")
    return name


def is_training(arguments: Sequence[str]) -> bool:
    """Whether a command trains; one that only looks or asks for help does not."""
    return command_of(arguments) == "train" and not {"--dry-run", "--help"} & set(arguments)


def command_of(arguments: Sequence[str]) -> str:
    """`train` of `--debug train clip-tiny`; empty where there is none. What stands before a command takes no values."""
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def submission_id(run: str, earlier: Iterable[str]) -> str:
    """Of the next job of a run.

    Args:
        earlier: ids of its jobs that this cluster knows. The same for all who submit the run now, so that only one job is taken.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run)
    numbers = [int(rest) for job_id in earlier if (rest := job_id.removeprefix(f"{name}-")).isdigit()]
    return f"{name}-{max(numbers, default=0) + 1}"


def _recipe(arguments: Sequence[str]) -> str:
    """`clip-tiny` of a recipe's name, `mine` of mine.yaml, in what a run's name may have; `run` where it could be an option's value."""
    words = arguments[arguments.index("train") :]
    found = (word for before, word in pairwise(words) if not (before.startswith("-") or word.startswith("-")))
    first = next(found, "run")
    name = PurePath(first).stem if first.endswith((".yaml", ".yml", ".json")) else first
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:_RECIPE_CHARACTERS].strip("-._") or "run"
