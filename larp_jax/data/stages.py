"""Where the time of reading clips goes. Costs next to nothing unless someone measures."""

import collections
import contextlib
import threading
import time

_thread = threading.local()
_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def measure():
    """Gives a Counter that gathers the seconds of each `stage` entered by this thread inside of the block."""
    _thread.seconds = collections.Counter()
    try:
        yield _thread.seconds
    finally:
        _thread.seconds = None


def stage(name: str):
    """A block whose time counts as `name`; blocks do not nest."""
    seconds = getattr(_thread, "seconds", None)
    return _NOTHING if seconds is None else _timed(seconds, name)


@contextlib.contextmanager
def _timed(seconds: collections.Counter, name: str):
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began
