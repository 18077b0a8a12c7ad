"""A limit on the time that a video may take: one bad file, or a file server that hangs, should not stop a run."""

import contextvars
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from larp_jax.errors import InputError

# Seconds for a clip; a first frame, an index or a window of a whole video count alike.
VARIABLE, DEFAULT = "LARP_VIDEO_TIME_LIMIT", 60.0

T = TypeVar("T")


def within_limit(function: Callable[..., T], *arguments) -> T:
    """function(*arguments), in a thread of its own that is left alone if it does not return: nothing can stop it.

    Raises:
      TimeoutError: it took longer than $LARP_VIDEO_TIME_LIMIT seconds (60 without).
      InputError: the variable is no number above 0.
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
    # In parts, so that a process that was stopped for a while counts no more than one of them.
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
    """The limit in seconds."""
    text = os.environ.get(VARIABLE) or str(DEFAULT)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0.0 < limit < threading.TIMEOUT_MAX:
        raise InputError(f"{VARIABLE}={text} must be a number of seconds above 0")
    return limit
