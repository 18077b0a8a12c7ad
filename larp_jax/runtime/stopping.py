"""Handling of SIGINT (Ctrl-C) and SIGTERM: end a command promptly, or after its current work is complete."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import ClassVar, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that a block has to end by itself before its process is ended.
PATIENCE = 3.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. The message is one line: which signal, and what was done before."""


class StopRequest:
    """Handles SIGINT and SIGTERM in a `with` block.

    A signal raises `Interrupted` in the block. After `defer` it is only stored in `signal`, and a second SIGINT raises.
    Python's own handlers do not run while compiled code does, such as the XLA compiler: if the block has not ended
    within `PATIENCE` seconds, its `end_process`, or that of an outer block, is called from another thread.

    Args:
      so_far: the message after the name of the signal.
      end_process: called with the message, ends the process; None leaves that to an outer block.

    Attributes:
      signal: the first signal received; None if there was none.
      so_far: as given; may change.
    """

    _active: ClassVar[list[Self]] = []

    def __init__(self, so_far: str = "", *, end_process: Callable[[str], None] | None = None):
        self.signal: int | None = None
        self.so_far = so_far
        self._end_process = end_process
        self._deferred = self._ending = False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only the main thread receives signals
            for number in SIGNALS:
                self._restore.callback(signal.signal, number, signal.signal(number, self._note))
            self._active.append(self)
            self._restore.callback(self._active.remove, self)
            if self._end_process is not None:
                self._watch()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._restore.close()
        if self._ending and isinstance(error, Exception):  # other code turned `Interrupted` into its own error
            raise Interrupted(self._message(self.signal)) from error

    @property
    def name(self) -> str:
        """Name of the signal received; if there was none, another process of the run received it."""
        return signal.Signals(self.signal).name if self.signal else "a signal to another process"

    def defer(self, so_far: str = "") -> None:
        """From now on signals are only stored; a second SIGINT raises with this `so_far` as its message."""
        self._deferred, self.so_far = True, so_far

    def _note(self, number, frame) -> None:
        again = self.signal is not None
        self.signal = self.signal or number
        if number == signal.SIGINT if again else not self._deferred:
            self._ending = True
            raise Interrupted(self._message(number))

    def _message(self, number: int) -> str:
        return f"stopped by {signal.Signals(number).name} {self.so_far}".strip()

    def _watch(self) -> None:
        """Starts the thread that receives signals even while compiled code runs, through a pipe."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        ended = threading.Event()

        def watch():
            signals = 0
            while number := os.read(read, 1):
                if number[0] not in SIGNALS:
                    continue
                signals += 1
                may_wait = signals == 1 or number[0] != signal.SIGINT
                if ended.wait(PATIENCE) or not self._active:
                    continue
                innermost = self._active[-1]
                if not (innermost._deferred and may_wait):
                    self._end_process(innermost._message(number[0]))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()

        def close():
            signal.set_wakeup_fd(previous)
            ended.set()
            os.close(write)
            thread.join()
            os.close(read)

        self._restore.callback(close)


def _forget() -> None:
    """In a forked process: restores the default handling of signals."""
    if StopRequest._active:
        StopRequest._active.clear()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
