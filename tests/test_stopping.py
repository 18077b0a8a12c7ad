"""SIGINT and SIGTERM: immediate, deferred, during compiled code, in other threads."""

import hashlib
import os
import signal
import threading

import pytest

from larp_jax.runtime import stopping
from larp_jax.runtime.stopping import Interrupted, StopRequest


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_ends_the_block_and_says_how_far_it_was(number):
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    with pytest.raises(Interrupted, match=f"^stopped by {number.name} before anything$"):
        with StopRequest("before anything") as stop:
            send(number)
    assert stop.signal == number
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before


def test_a_deferred_signal_is_noted_and_a_second_interrupt_does_not_wait():
    with StopRequest() as stop:
        stop.defer("without waiting")
        for number in (signal.SIGTERM, signal.SIGTERM):
            send(number)
        assert stop.signal == signal.SIGTERM and stop.name == "SIGTERM"
        with pytest.raises(Interrupted, match="^stopped by SIGINT without waiting$"):
            send(signal.SIGINT)


def test_an_error_caused_by_the_interruption_does_not_hide_it():
    with pytest.raises(Interrupted):
        with StopRequest():
            try:
                send(signal.SIGTERM)
            except BaseException:
                raise RuntimeError("the compiler failed") from None
    with pytest.raises(ZeroDivisionError):
        with StopRequest():
            raise ZeroDivisionError


def compiled_code():
    """Takes some seconds in which Python's signal handlers do not run, but other threads do."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)


def test_compiled_code_does_not_delay_the_end(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)
    ended, working = [], threading.Event()

    def end_process(message):
        ended.append((message, working.is_set()))

    with pytest.raises(Interrupted):
        with StopRequest(end_process=end_process), StopRequest("before the first step"):
            working.set()
            threading.Timer(0.1, send, [signal.SIGTERM]).start()
            compiled_code()
            working.clear()
            for _ in range(1000):
                pass
    assert ended == [("stopped by SIGTERM before the first step", True)]


def test_a_deferred_block_is_not_ended_by_a_first_signal(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.01)
    ended, second = [], threading.Event()
    with StopRequest(end_process=lambda message: (ended.append(message), second.set())), StopRequest() as stop:
        stop.defer()
        send(signal.SIGINT)
        assert not second.wait(0.5)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)
        assert second.wait(10)
    assert ended == ["stopped by SIGINT"]


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopRequest(end_process=print):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_forked_process_has_default_signal_handlers():
    with StopRequest(end_process=print):
        child = os.fork()
        if not child:
            os._exit(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
        assert os.waitpid(child, 0)[1] == 0
