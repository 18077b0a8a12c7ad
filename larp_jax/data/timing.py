"""Time spent in the stages of reading clips. The overhead is negligible without `measure`."""

import collections
import contextlib
import contextvars
import time

_seconds: contextvars.ContextVar[collections.Counter | None] = contextvars.ContextVar("seconds", default=None)
_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def measure():
    """Context manager that returns a Counter of the seconds spent in each `stage` inside it."""
    seconds = collections.Counter()
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


def stage(name: str):
    """Context manager whose time counts as `name`; stages must not be nested."""
    seconds = _seconds.get()
    return _NOTHING if seconds is None else _timed(seconds, name)


@contextlib.contextmanager
def _timed(seconds: collections.Counter, name: str):
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began
