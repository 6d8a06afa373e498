"""transformers and the hub's client without what they print of their own accord."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as hf_logging

_LOGGERS = ("huggingface_hub", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Commands show their own progress, and tell in one line what did not work: the hub's client would tell of each of its retries."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    shown, levels = hf_logging.is_progress_bar_enabled(), [logger.level for logger in loggers]
    hf_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            hf_logging.enable_progress_bar()
