"""Where the wall time of a run goes."""

import collections
import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Splits wall time between steps and other activities of the training loop.

    Everything that is not measured as an activity counts as steps: computing them, and waiting for the device.
    """

    def __init__(self):
        self._since = time.perf_counter()
        self._step: int | None = None
        self._seconds: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Context manager whose time counts as an activity. Activities must not be nested."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - began

    def read(self, step: int) -> dict[str, float]:
        """What happened since the last call, or since the start.

        Args:
          step: number of the last finished step.

        Returns:
          Seconds, except for `goodput`: `step` (of one step, mean), `input` (waiting for the clips of one step, mean),
          `evaluation`, `checkpoint` (in which saving stopped the loop) and `start` (before the first step, including
          its compilation), sums; `goodput`, the share of the wall time in steps. All by name, with the prefix `time/`.
        """
        now = time.perf_counter()
        seconds, self._seconds = self._seconds, collections.Counter()
        wall, self._since = now - self._since, now
        steps = step - self._step if self._step is not None else 1
        self._step = step
        in_steps = max(wall - sum(seconds.values()), 0.0)
        sums = {name: seconds[name] for name in ("evaluation", "checkpoint", "start") if seconds[name]}
        means = {"step": in_steps / max(steps, 1), "input": seconds["input"] / max(steps, 1)}
        return {f"time/{name}": value for name, value in (means | sums | {"goodput": in_steps / wall}).items()}
