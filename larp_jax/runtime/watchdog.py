"""Ends a run of several processes in which one of them hangs, and says which.

A process that dies is noticed by the coordination service of JAX. One whose threads live on, but which waits forever
for a disk, a worker process or a device, is not: the others wait for it in their next sum over all devices, without a
limit. So every process tells the others which step it is in, and what it does there.
"""

import logging
import os
import socket
import sys
import threading
import time

import jax

from larp_jax.errors import reason

logger = logging.getLogger(__name__)

# In the order in which each step goes through them.
EVALUATE, SAVE, READ, COMPUTE = "evaluates", "saves", "waits for the clips of", "computes"
ORDER = (EVALUATE, SAVE, READ, COMPUTE)
# Seconds without progress after which the run ends, and the same while everything may be slow: in an evaluation, and in
# the first step, which is compiled.
LIMIT, LONG_LIMIT = 300.0, 3600.0
POLL = 5.0  # seconds between two looks
_KEY = "larp_jax/progress/"


class Watchdog:
    """Watches the progress of all processes from a thread of each; a context manager. One process watches nothing."""

    def __init__(self):
        self._at: tuple[int, str, bool] = (0, COMPUTE, True)
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._client = _client() if jax.process_count() > 1 else None

    def __enter__(self) -> "Watchdog":
        if self._client is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()

    def at(self, step: int, activity: str, *, slow: bool = False) -> None:
        """Notes what this process does from now on.

        Args:
          step: number of finished steps.
          activity: one of `ORDER`.
          slow: whether it may take long.
        """
        self._at, self._since = (step, activity, slow), time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(POLL):
            step, activity, slow = self._at
            text = f"{step}|{ORDER.index(activity)}|{socket.gethostname()}"
            try:
                self._client.key_value_set(f"{_KEY}{jax.process_index()}", text, allow_overwrite=True)
                if time.monotonic() - self._since > (LONG_LIMIT if slow else LIMIT):
                    found = dict(self._client.key_value_dir_get(_KEY))
                    self._end({int(key.rpartition("/")[2]): value.split("|") for key, value in found.items()})
            except Exception as error:  # the coordination service reports its own problems
                logger.debug("progress is not watched: %s", reason(error))

    def _end(self, progress: dict[int, list[str]]) -> None:
        """Names the processes that are behind the others, and ends this one."""
        places = {process: (int(step), int(activity)) for process, (step, activity, _) in progress.items()}
        first, last = min(places.values()), max(places.values())
        step, activity = first
        doing = f"{ORDER[activity]} step {step + (activity > ORDER.index(SAVE))}"
        if first == last:
            who = f"all {len(places)} processes hang: each {doing}, so a device or the network between them is stuck"
        else:
            behind = [f"{process} on {progress[process][2]}" for process in sorted(places) if places[process] == first]
            who = f"process {', '.join(behind)} hangs: it {doing}, and the others wait for it"
        seconds = time.monotonic() - self._since
        sys.stdout.flush()
        print(
            f"larp-jax: error: no progress for {seconds:.0f} seconds; {who}. Look at that host, then start all"
            " processes again with the same commands: the run continues from its newest checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        if jax.process_index() == 0:
            time.sleep(2 * POLL)  # its end also ends the others, which should say the same
        os._exit(1)


def _client():
    """The client of JAX's coordination service, which also stores small texts; None if this JAX has none."""
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError):
        return None
