"""The command line: `larp-jax COMMAND`. What a command needs is imported when it runs, so that help is instant."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from larp_jax.cli import data, evaluation, inference, tools, training, weights
from larp_jax.cli.arguments import Parser, check_paths
from larp_jax.cli.output import Printable
from larp_jax.errors import InputError, printable, reason
from larp_jax.runtime import allocator, distributed
from larp_jax.runtime.stopping import StopRequest
from larp_jax.version import __version__

# In the order of `larp-jax --help`.
COMMANDS = (
    training.add_train,
    evaluation.add_evaluate,
    evaluation.add_analyze,
    inference.add_reconstruct,
    inference.add_tokenize,
    inference.add_detokenize,
    inference.add_sample,
    inference.add_predict,
    weights.add_export,
    weights.add_import,
    data.add_prepare,
    tools.add_plan,
    tools.add_benchmark,
    tools.add_report,
    tools.add_doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: its arguments; those of the process by default.

    Returns:
      The exit code: 0, 1 where something failed while running, 2 where what was given is wrong.
    """
    debug = interrupted = False
    if argv is None:  # a process of its own, in which JAX has not started yet
        allocator.keep_freed_memory()
    try:
        with _logging(), contextlib.redirect_stdout(Printable(sys.stdout)):
            arguments = parse(sys.argv[1:] if argv is None else list(argv))
            debug = arguments.debug
            check_paths(arguments)
            # the inner one, because joining other processes makes JAX swallow SIGTERM
            with StopRequest(end_process=_end_process), _among_processes(arguments), StopRequest():
                with _computing(arguments.command):
                    arguments.run(arguments)
            return 0
    except KeyboardInterrupt as error:
        code, interrupted = _complain(str(error) or "interrupted", 1, debug), True
    except InputError as error:
        code = _complain(str(error), 2, debug)
    except Exception as error:  # whatever it is, users get a line to read and not a traceback
        code = _complain(distributed.explain(error) or _reason(error), 1, debug)
    distributed.leave(code)
    if interrupted and argv is None:  # a compiler that is still at work would hold up the ordinary way out
        _exit(code)
    return code


def _end_process(message: str) -> NoReturn:
    """Ends the process from another thread than the one that works, which nothing else would stop."""
    _exit(_complain(message, 1, False))


def _exit(code: int) -> NoReturn:
    """Ends the process at once, and those that it started."""
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
    print(f"larp-jax: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str:
    """One line for an error that no one put into words; those raised on purpose need no more than these."""
    if type(error).__module__.startswith("larp_jax") or isinstance(error, OSError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}: {reason(error)} (--debug shows where)"


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command; settings of its config, which follow later, are in `overrides`."""
    parser = Parser(
        prog="larp-jax", description="LARP: a video tokenizer with a learned autoregressive prior.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"larp_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    arguments, rest = parser.parse_known_args(argv)
    arguments.overrides = rest if hasattr(arguments, "config") else []
    unknown = [text for text in rest if text not in arguments.overrides]
    if unknown:
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}; see larp-jax {arguments.command} --help")
    return arguments


# ------------------------------------------------------------------------------------------------------------ logging


class _Lines(logging.Handler):
    """Messages as plain lines on standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(printable(f"{prefix}{record.getMessage()}"), file=sys.stderr)


@contextlib.contextmanager
def _among_processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of a command that may have some; only the first of them speaks, unless it warns."""
    if "coordinator" in arguments:
        distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with contextlib.ExitStack() as stack:
        if not distributed.is_first():
            logging.getLogger("larp_jax").setLevel(logging.WARNING)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


@contextlib.contextmanager
def _computing(command: str) -> Iterator[None]:
    """JAX as a command needs it: with a device, and with numbers that do not depend on the environment."""
    if command in ("doctor", "prepare", "report"):
        yield
        return
    from larp_jax.runtime import rng

    with rng.pinned():
        if command != "plan":  # which brings devices of its own
            distributed.check_devices()
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Shows what larp_jax logs, and of other packages only errors."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logger, handler = logging.getLogger("larp_jax"), _Lines()
    before = logger.level, logger.propagate, sys.excepthook
    # Nothing gets past main(), but for what threads of TensorStore raise after a save has failed.
    sys.excepthook = lambda *error: logger.debug("in a thread: %s", error)
    for name in ("jax", "orbax", "grain", "tensorflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("absl", "asyncio"):  # Orbax shows tracebacks there of what it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # some package always gives the root logger a handler of its own
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate, sys.excepthook = before
