"""The command line: `larp-jax COMMAND`. Commands import what they need when they run, so that help is instant."""

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
    inference.add_allocate,
    inference.add_features,
    inference.add_sample,
    inference.add_predict,
    inference.add_stream,
    weights.add_export,
    weights.add_import,
    data.add_prepare,
    tools.add_experiment,
    tools.add_plan,
    tools.add_benchmark,
    tools.add_report,
    tools.add_demo,
    tools.add_doctor,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the command and its arguments; by default those of the process.

    Returns:
      The exit code: 0 for success, 1 for a failure while running, 2 for wrong arguments, configs or inputs.
    """
    debug = interrupted = False
    if argv is None:  # called as a program: JAX has not started yet
        allocator.keep_freed_memory()
    try:
        with _logging(), contextlib.redirect_stdout(Printable(sys.stdout)):
            arguments = parse(sys.argv[1:] if argv is None else list(argv))
            debug = arguments.debug
            check_paths(arguments)
            # StopRequest twice: joining other processes makes JAX replace the handler of SIGTERM
            with StopRequest(end_process=_end_process), _among_processes(arguments), StopRequest():
                with _computing(arguments.command):
                    arguments.run(arguments)
            return 0
    except KeyboardInterrupt as error:
        code, interrupted = _print_error(str(error) or "interrupted", 1, debug), True
    except InputError as error:
        code = _print_error(str(error), 2, debug)
    except Exception as error:  # users get one line for any error, not a traceback
        code = _print_error(distributed.explain(error) or _reason(error), 1, debug)
    distributed.leave(code)
    if interrupted and argv is None:  # a normal exit would wait for a running compilation
        _exit(code)
    return code


def _end_process(message: str) -> NoReturn:
    """Ends the process from a second thread, because the main thread cannot be stopped."""
    _exit(_print_error(message, 1, False))


def _exit(code: int) -> NoReturn:
    """Ends the process and its child processes at once."""
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_error(message: str, code: int, debug: bool) -> int:
    """Prints an error in one line, after its traceback if `debug`; returns `code`."""
    if debug:
        sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
    print(f"larp-jax: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str:
    """One line for an error of any type; errors of this package and of the operating system have a clear message."""
    if type(error).__module__.startswith("larp_jax") or isinstance(error, OSError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    if type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google", "requests"):
        return f"the bucket does not answer ({type(error).__name__}: {reason(error)}); the same command continues later"
    return f"{type(error).__name__}: {reason(error)} (--debug shows where)"


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of its commands by name, in the order of `larp-jax --help`."""
    parser = Parser(
        prog="larp-jax", description="LARP: a video tokenizer with a learned autoregressive prior.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"larp_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser, dict(commands.choices)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of a command. `overrides` are the settings of its config, which `load_recipe` checks."""
    arguments, rest = parsers()[0].parse_known_args(argv)
    arguments.overrides = rest if hasattr(arguments, "config") else []
    unknown = [text for text in rest if text not in arguments.overrides]
    if unknown:
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}; see larp-jax {arguments.command} --help")
    return arguments


# ------------------------------------------------------------------------------------------------------------ logging


class _Lines(logging.Handler):
    """Writes messages as plain lines to standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(printable(f"{prefix}{record.getMessage()}"), file=sys.stderr)


@contextlib.contextmanager
def _among_processes(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of a multi-process command; all but the first process print only warnings."""
    if "coordinator" in arguments:
        distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    with contextlib.ExitStack() as stack:
        if not distributed.is_first():
            logging.getLogger("larp_jax").setLevel(logging.WARNING)
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


@contextlib.contextmanager
def _computing(command: str) -> Iterator[None]:
    """Checks the devices of JAX and pins its random numbers, so that they do not depend on the environment."""
    if command in ("doctor", "prepare", "report"):
        yield
        return
    from larp_jax.runtime import rng

    with rng.pinned():
        if command != "plan":  # plan chooses its own devices
            distributed.check_devices()
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Shows the messages of larp_jax, and only errors of other packages."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logger, handler = logging.getLogger("larp_jax"), _Lines()
    before = logger.level, logger.propagate, sys.excepthook
    # main() catches all exceptions except those in threads of TensorStore after a failed save.
    sys.excepthook = lambda *error: logger.debug("in a thread: %s", error)
    for name in ("jax", "orbax", "grain", "tensorflow", "huggingface_hub", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("absl", "asyncio", "gcsfs"):  # tracebacks of errors that are also raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other packages add handlers to the root logger
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate, sys.excepthook = before
