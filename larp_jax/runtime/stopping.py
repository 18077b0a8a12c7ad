"""What SIGINT (Ctrl-C) and SIGTERM do: end a command promptly, or wait until what it works on is whole."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import ClassVar, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds for a block to end by itself before its process is ended.
PATIENCE = 3.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. The message is one line: which signal, and what was done before it."""


class StopRequest:
    """What SIGINT and SIGTERM do in a block.

    A signal ends the block by `Interrupted`. After `defer` it is only noted in `signal`, and a second SIGINT ends the
    block. Python's own handlers wait while compiled code runs, such as a compiler: where the block has not ended within
    `PATIENCE` seconds, `end_process` of it, or of a block around it, is called from another thread.

    Args:
      so_far: what to say after the name of the signal.
      end_process: takes the message and ends the process; None leaves that to a block around this one.

    Attributes:
      signal: the first signal that came; None without.
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
        if threading.current_thread() is threading.main_thread():  # else signals are somebody else's
            for number in SIGNALS:
                self._restore.callback(signal.signal, number, signal.signal(number, self._note))
            self._active.append(self)
            self._restore.callback(self._active.remove, self)
            if self._end_process is not None:
                self._watch()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._restore.close()
        if self._ending and isinstance(error, Exception):  # something on the way has turned it into its own error
            raise Interrupted(self._message(self.signal)) from error

    @property
    def name(self) -> str:
        """Of the signal that came here; without one, another process of the run got it."""
        return signal.Signals(self.signal).name if self.signal else "a signal to another process"

    def defer(self, so_far: str = "") -> None:
        """From now on signals are only noted, and a second SIGINT is told with this `so_far`."""
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
        """Starts the thread that sees signals even while compiled code runs, through a pipe that the system fills."""
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
    """In a forked process: signals that it gets are not its parent's."""
    if StopRequest._active:
        StopRequest._active.clear()
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
