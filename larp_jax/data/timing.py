"""Where the time of reading clips goes. Costs next to nothing unless someone measures."""

import collections
import contextlib
import contextvars
import time

_seconds: contextvars.ContextVar[collections.Counter | None] = contextvars.ContextVar("seconds", default=None)
_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def measure():
    """Gives a Counter that gathers the seconds of each `stage` entered inside of the block, in this context."""
    seconds = collections.Counter()
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


def stage(name: str):
    """A block whose time counts as `name`; blocks do not nest."""
    seconds = _seconds.get()
    return _NOTHING if seconds is None else _timed(seconds, name)


@contextlib.contextmanager
def _timed(seconds: collections.Counter, name: str):
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began
