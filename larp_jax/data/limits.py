"""A time limit for reading videos, so that a bad file or a hanging file server does not stop a run."""

import contextvars
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from larp_jax.errors import InputError

# Seconds for a clip; also for a first frame, an index, or a window of a video that is read completely.
VARIABLE, DEFAULT = "LARP_VIDEO_TIME_LIMIT", 60.0

T = TypeVar("T")


def within_limit(function: Callable[..., T], *arguments) -> T:
    """function(*arguments) in a new thread, which is abandoned at the time limit: threads cannot be stopped.

    Raises:
      TimeoutError: it took longer than $LARP_VIDEO_TIME_LIMIT seconds (default: 60).
      InputError: the variable is not a number above 0.
    """
    limit = time_limit()
    outcome = []  # (result, error)

    def run():
        try:
            outcome.append((function(*arguments), None))
        except BaseException as error:
            outcome.append((None, error))
        done.set()

    done = threading.Event()
    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    # Waits in parts, so that a pause of the whole process counts as at most one part.
    for _ in range(20):
        if done.wait(limit / 20):
            break
    else:
        raise TimeoutError(f"took longer than {limit:g} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def time_limit() -> float:
    """The time limit in seconds."""
    text = os.environ.get(VARIABLE) or str(DEFAULT)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0.0 < limit < threading.TIMEOUT_MAX:
        raise InputError(f"{VARIABLE}={text} must be a number of seconds above 0")
    return limit
