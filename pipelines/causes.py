"""Our own error out of what Ray wrapped around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

from mm_core.errors import MMError


def own_error(error: BaseException) -> MMError | None:
    """The first error of mm among `error` and what caused it, on any worker; None where there is none.

    An error of a task comes back as an instance of both its own class and RayTaskError, whose message is a traceback and which Ray
    takes for a failed input when it is sent on: what is wanted is its cause.
    """
    seen: BaseException | None = error
    while seen is not None:
        for each in (*getattr(seen, "worker_failures", {}).values(), seen):
            if isinstance(each, MMError) and not isinstance(each, RayError):
                return each
            cause = getattr(each, "cause", None)
            if isinstance(cause, MMError) and not isinstance(cause, RayError):
                return cause
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise our own error in the place of one of Ray's that it caused."""
    try:
        yield
    except RayError as error:
        if (own := own_error(error)) is None:
            raise
        raise own from None
