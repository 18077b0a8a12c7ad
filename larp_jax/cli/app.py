"""The command line: `larp-jax COMMAND`. What a command needs is imported when it runs, so that help is instant."""

import argparse
import contextlib
import functools
import importlib.util
import logging
import math
import multiprocessing
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from larp_jax import files
from larp_jax.errors import InputError, printable, reason
from larp_jax.runtime import allocator, distributed
from larp_jax.runtime.stopping import StopRequest
from larp_jax.version import __version__

CHECKPOINT = "a workdir (its newest checkpoint), a checkpoint, an imported or a Hugging Face style directory"
SPEC = "tfds:NAME[/CONFIG][:SPLIT], folder:PATH or moving_shapes[:SPLIT]"


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
        with _logging(), contextlib.redirect_stdout(_Printable(sys.stdout)):
            arguments = _parse(sys.argv[1:] if argv is None else list(argv))
            debug = arguments.debug
            _check_paths(arguments)
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


# ------------------------------------------------------------------------------------------------------------ parsing


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like everything else."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="larp-jax", description="LARP: a video tokenizer with a learned autoregressive prior.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"larp_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], None], summary: str, example: str) -> argparse.ArgumentParser:
        name = run.__name__.strip("_")
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  larp-jax {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    def needs_config(sub):
        sub.add_argument(
            "--config", required=True, metavar="FILE[:VARIANT]",
            help="Python file with a recipe; --config.steps=1000 and the like change its settings",
        )  # fmt: skip

    def needs_checkpoint(sub):
        sub.add_argument("--checkpoint", required=True, metavar="P", help=CHECKPOINT)
        sub.add_argument(
            "--weights", choices=("ema", "raw"), default="ema", help="the moving average where there is one, or not"
        )

    def reads_videos(sub, max_clips):
        sub.add_argument("--input", required=True, metavar="I", help=f"video file, folder of them, or {SPEC}")
        sub.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
        sub.add_argument(
            "--max-clips", type=_count, default=max_clips, metavar="N",
            help=f"of a data set, at most N clips spread over it; 0 for all (default: {max_clips})",
        )  # fmt: skip
        batch_size(sub)

    def batch_size(sub):
        sub.add_argument(
            "--batch-size", type=_positive, default=8, metavar="B", help="clips computed at a time (default: 8)"
        )

    def draws(sub, what):
        sub.add_argument("--seed", type=_seed, default=0, help=f"{what} i of a seed is always the same (default: 0)")
        sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the draws (default: 1)")
        sub.add_argument("--top-k", type=_count, default=0, metavar="K", help="draw among the K likeliest codes")
        sub.add_argument(
            "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest codes that make up P"
        )
        precision(sub)

    def precision(sub):
        sub.add_argument(
            "--precision", choices=("float32", "bfloat16"), default="float32", help="of the computation"
        )

    def guidance(sub, default):
        sub.add_argument(
            "--cfg-scale", type=float, default=default, metavar="S", help=f"guidance; 1 for none (default: {default:g})"
        )
        sub.add_argument(
            "--cfg-interval", type=int, default=-1, metavar="I", help="guide the first I + 2 codes only (default: all)"
        )

    def over_processes(sub):
        group = sub.add_argument_group(
            "several processes", "given to each of them; TPU pods, srun and mpirun need none of these"
        )
        group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
        group.add_argument("--num-processes", type=_positive, metavar="N", help="how many there are")
        group.add_argument("--process-id", type=_count, metavar="I", help="which one this is, from 0")

    sub = command(
        _train,
        "train a stage, or continue where the workdir left off",
        "--config configs/quickstart.py --workdir runs/quickstart --config.steps=1000",
    )
    needs_config(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run, the same for all processes")
    over_processes(sub)

    sub = command(
        _evaluate,
        "measure how well a tokenizer reconstructs a data set, or how close a generator comes to it",
        "--checkpoint runs/quickstart --data moving_shapes:test --output evaluation.json",
    )
    needs_checkpoint(sub)
    sub.add_argument("--data", required=True, metavar="SPEC", help=SPEC)
    sub.add_argument(
        "--metrics", type=lambda text: text.split(","), metavar="A,B",
        help="of psnr, ssim, lpips, rfvd, usage and prior; of a generator, fvd and cross_entropy (default: all that fit"
        " and need no further network)",
    )  # fmt: skip
    sub.add_argument("--lpips", metavar="FILE", help="for lpips: what larp-jax import --kind lpips wrote")
    sub.add_argument("--i3d", metavar="FILE", help="for rfvd and fvd: what larp-jax import --kind i3d wrote")
    sub.add_argument(
        "--protocol", choices=("held_out", "larp_ucf101", "larp_ucf101_generation", "larp_k600_prediction"),
        help="choose the clips as docs/evaluation.md says (default: all windows of the split test)",
    )  # fmt: skip
    sub.add_argument(
        "--training-data", metavar="SPEC", help="for held_out: what to leave out (default: what the checkpoint names)"
    )
    sub.add_argument("--output", metavar="FILE", help="JSON file for the numbers and how they were computed")
    sub.add_argument("--max-clips", type=_count, default=0, metavar="N", help="at most N clips; 0 for all (default)")
    batch_size(sub)
    of_generators = sub.add_argument_group("of generators")
    of_generators.add_argument("--tokenizer", metavar="P", help="the one that the generator was trained with")
    of_generators.add_argument(
        "--samples", metavar="DIR", help="for fvd: keep the codes sampled there, and go on with those already there"
    )
    guidance(of_generators, 1.0)
    draws(of_generators, "sample")
    over_processes(sub)

    sub = command(
        _analyze,
        "find out what each token position of a tokenizer carries",
        "--checkpoint runs/quickstart --data moving_shapes:test --output runs/quickstart/analysis",
    )
    needs_checkpoint(sub)
    sub.add_argument("--data", required=True, metavar="SPEC", help=SPEC)
    sub.add_argument("--output", required=True, metavar="DIR", help="folder for numbers and pictures")
    sub.add_argument(
        "--max-clips", type=_count, default=256, metavar="N",
        help="statistics of codes are of at most N clips; 0 for all (default: 256)",
    )  # fmt: skip
    sub.add_argument(
        "--ablated-clips", type=_count, default=16, metavar="N",
        help="codes are replaced in at most N clips, which takes one decoding a position each (default: 16)",
    )  # fmt: skip
    sub.add_argument(
        "--replace", choices=("other", "common"), default="other",
        help="by the code of another clip, or by the most frequent one, of the same position (default: other)",
    )  # fmt: skip
    batch_size(sub)

    sub = command(
        _reconstruct,
        "write videos beside their reconstructions, with their PSNR",
        "--checkpoint runs/quickstart --input videos --output reconstructions",
    )
    needs_checkpoint(sub)
    reads_videos(sub, max_clips=8)

    sub = command(
        _tokenize,
        "write the codes of videos",
        "--checkpoint runs/quickstart --input folder:videos --output codes",
    )
    needs_checkpoint(sub)
    reads_videos(sub, max_clips=0)
    sub.add_argument(
        "--windows", type=_count, default=0, metavar="W",
        help="of every video, at most W full windows, spread over it (default: consecutive ones)",
    )  # fmt: skip
    sub.add_argument("--flips", action="store_true", help="add the codes of all windows mirrored")
    sub.add_argument(
        "--cond-frames", type=_count, default=0, metavar="F",
        help="add the codes that frame prediction from F frames starts from",
    )  # fmt: skip

    sub = command(
        _detokenize,
        "write the videos of codes",
        "--checkpoint runs/quickstart --input codes --output videos_again",
    )
    needs_checkpoint(sub)
    sub.add_argument("--input", required=True, metavar="DIR", help="folder that tokenize wrote")
    sub.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    batch_size(sub)

    def samples(sub, what):
        sub.add_argument("--checkpoint", required=True, metavar="G", help=f"the generator: {CHECKPOINT}")
        sub.add_argument("--tokenizer", required=True, metavar="P", help="the tokenizer it was trained with, likewise")
        sub.add_argument(
            "--weights", choices=("ema", "raw"), default="ema", help="the moving average where there is one, or not"
        )
        sub.add_argument("--output", required=True, metavar="DIR", help="folder to write to, or to go on writing to")
        draws(sub, what)
        batch_size(sub)
        over_processes(sub)

    sub = command(
        _sample,
        "sample videos by class",
        "--checkpoint runs/generator --tokenizer runs/ucf101 --classes 0,3 --num 16 --cfg-scale 1.25 --output samples",
    )
    samples(sub, "sample")
    sub.add_argument(
        "--classes", metavar="C", help="by number or name: 0,walk shares --num out evenly, 0:100,walk:50 gives the"
        " count of each; without, classes are as frequent as in training where that is known, else all alike",
    )  # fmt: skip
    sub.add_argument("--num", type=_positive, metavar="N", help="videos in all (default: 16)")
    guidance(sub, 1.0)

    sub = command(
        _predict,
        "predict how videos go on after their first frames",
        "--checkpoint runs/predictor --tokenizer runs/k600 --input video.mp4 --cond-frames 5 --output predictions",
    )
    samples(sub, "prediction")
    sub.add_argument("--input", required=True, metavar="I", help=f"video file, folder of them, or {SPEC}")
    sub.add_argument("--cond-frames", type=_positive, default=5, metavar="F", help="frames given (default: 5)")
    sub.add_argument(
        "--max-clips", type=_count, default=8, metavar="N", help="at most N clips; 0 for all (default: 8)"
    )

    sub = command(
        _export,
        "write a tokenizer for other frameworks",
        "--checkpoint runs/quickstart --format codebook-npz --output codebook.npz",
    )
    needs_checkpoint(sub)
    sub.add_argument("--format", required=True, choices=EXPORTS, help="what to write")
    sub.add_argument("--output", required=True, metavar="PATH", help="file (codebooks) or directory")

    sub = command(
        _import,
        "turn released PyTorch weights into a checkpoint, or those of LPIPS and I3D into a file",
        "--source larp_tokenizer --output runs/released",
    )
    sub.add_argument(
        "--kind", choices=("model", "lpips", "i3d"), default="model", help="what to import (default: model)"
    )
    sub.add_argument(
        "--source", required=True, metavar="S",
        help="directory with config.json and model.safetensors, a Hugging Face repository id, or a .pth file; for lpips"
        " and i3d the file of VGG16 or I3D that doctor names",
    )  # fmt: skip
    sub.add_argument("--heads", metavar="FILE", help="for lpips: the file of its heads")
    sub.add_argument("--output", required=True, metavar="P", help="new folder for the checkpoint; else a file")
    sub.add_argument("--ema", action="store_true", help="take the moving average out of a .pth file")

    sub = command(
        _prepare,
        "turn videos into a data set of frames at training size, which training reads many times faster",
        "--input videos --output prepared --size 128\n"
        "  larp-jax prepare --input ucfTrainTestlist --root UCF-101 --output prepared/ucf101\n"
        "  then train with --config.data.train=tfds:prepared:train",
    )
    sub.add_argument(
        "--input", required=True, nargs="+", metavar="I",
        help="folder of videos (sub-folders give classes, and splits if called train, val or test), CSV files (path,"
        f" label; the authors'; Kinetics'), the folder of UCF101's lists, or {SPEC}",
    )  # fmt: skip
    sub.add_argument("--output", required=True, metavar="DIR", help="new folder; run again, it continues")
    sub.add_argument("--root", metavar="DIR", help="folder that paths in lists start from (default: the list's)")
    sub.add_argument("--size", type=_positive, default=128, metavar="S", help="side of the frames (default: 128)")
    sub.add_argument("--storage", choices=("jpeg", "raw", "h264"), default="jpeg", help="of frames (default: jpeg)")
    sub.add_argument(
        "--quality", type=_count, metavar="Q", help="1 (best) to 31 for jpeg (default: 2), a CRF for h264 (default: 14)"
    )
    sub.add_argument("--workers", type=_count, default=0, metavar="N", help="processes (default: one a core)")
    sub.add_argument("--estimate", action="store_true", help="only say how large it would be")
    sub.add_argument(
        "--beam-options", metavar="O", help='make it on a cluster by Apache Beam, as in "--runner=DirectRunner"'
    )

    sub = command(
        _plan,
        "say what a training step takes of hardware that need not be there",
        "--config configs/larp_l_long.py --topology v5e:16x16 --config.remat=block",
    )
    needs_config(sub)
    hardware = sub.add_mutually_exclusive_group(required=True)
    hardware.add_argument("--topology", metavar="T", help="TPUs, v5e:4x4 or v5p:4x4x4: compiled for them, by libtpu")
    hardware.add_argument("--devices", type=_positive, metavar="N", help="emulated CPUs: compiled for them")
    hardware.add_argument("--gpus", metavar="KIND:N", help="GPUs, H200:8: estimated, nothing is compiled")
    sub.add_argument("--output", metavar="FILE", help="JSON file for the numbers")

    sub = command(
        _benchmark,
        "measure throughput",
        "train --config configs/quickstart.py --output train.json",
    )
    sub.add_argument(
        "what", choices=("train", "encode", "decode", "sample", "data"),
        help="the training step, or a tokenizer's encoding or decoding, on synthetic clips with weights at random; a"
        " generator's sampling, likewise; training batches, read with nothing else running",
    )  # fmt: skip
    needs_config(sub)
    sub.add_argument("--seconds", type=_positive, default=10, metavar="S", help="how long to measure (default: 10)")
    of_models = sub.add_argument_group("of benchmark encode, decode and sample")
    batch_size(of_models)
    precision(of_models)
    guidance(sub.add_argument_group("of benchmark sample"), 1.25)
    sub.add_argument("--output", metavar="FILE", help="JSON file for the numbers")
    sub.add_argument(
        "--model-rate", type=_positive, metavar="R", help="clips a second that training takes: can data keep up?"
    )

    sub = command(
        _report,
        "show a run on one HTML page: curves, pictures, codes, metrics, configuration",
        "--workdir runs/quickstart",
    )
    sub.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run, finished or not")
    sub.add_argument("--output", metavar="FILE", help="page to write (default: report.html in the workdir)")

    command(_doctor, "show versions, devices and what is missing", "")

    arguments, rest = parser.parse_known_args(argv)
    arguments.overrides = rest if hasattr(arguments, "config") else []
    unknown = [text for text in rest if text not in arguments.overrides]
    if unknown:
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}; see larp-jax {arguments.command} --help")
    return arguments


# Options that are a path, and those that may hold one: data sets, a repository or a recipe with its settings.
PATHS = ("workdir", "checkpoint", "tokenizer", "output", "samples", "lpips", "i3d", "heads", "root")
TEXTS = ("config", "overrides", "data", "training_data", "input", "source")
FOLDER_WRITERS = ("analyze", "reconstruct", "tokenize", "detokenize", "sample", "predict", "prepare")


def _check_paths(arguments: argparse.Namespace) -> None:
    """Expands `~` in every path, and refuses what is none of this machine, before anything starts."""
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if name in PATHS and value is not None:
            setattr(arguments, name, str(files.local_path(value, option)))
        elif name in TEXTS and value is not None:
            for text in [value] if isinstance(value, str) else value:
                files.refuse_url(text, "setting" if name == "overrides" else option)
    for name in ("workdir", "samples"):
        if getattr(arguments, name, None) and arguments.command != "report":
            files.check_folder(getattr(arguments, name), f"--{name}")
    if arguments.command in FOLDER_WRITERS:
        files.check_folder(arguments.output)


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 up")
    return value


def _seed(text: str) -> int:
    value = _count(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is above 2^64 - 1")
    return value


def _positive(text: str) -> int:
    value = _count(text)
    if not value:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def _load_recipe(arguments: argparse.Namespace):
    """The recipe of `--config` with its overrides."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    from larp_jax.config import parse_recipe, take_sizes

    path, _, variant = arguments.config.partition(":")
    path = os.path.expanduser(path)
    path = path if os.path.isfile(path) else _shipped(path)
    if not os.path.isfile(path):
        raise InputError(f"--config {path} is no file; give a recipe such as configs/quickstart.py")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise InputError("it defines no get_config(), which returns the recipe")
        config = get_config(variant) if variant else get_config()
    except InputError as error:
        raise InputError(f"--config {arguments.config}: {error}") from error
    except Exception as error:  # the file may hold anything
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {frames[-1]}: " if frames else ""
        text = " ".join(str(error).split())
        raise InputError(f"--config {arguments.config} fails: {where}{type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config {path}: get_config() must return a ConfigDict, not a {type(config).__name__}")

    overrides = _set_by_name(config, arguments.overrides)
    for text in overrides:
        if text.startswith(("--config.", "--noconfig.")):
            _check_name(config, text.split("=")[0].split(".")[1:])
    values = flags.FlagValues()
    argv = ["larp-jax", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        rest = [f"--{error.flagname}"]
    except Exception as error:  # of many kinds: what they hold, their types, their order
        raise InputError(reason(error)) from error
    if rest:
        raise InputError(f"unrecognized arguments: {' '.join(rest)}; see larp-jax {arguments.command} --help")
    take_sizes(values.config, config_flags.get_override_values(values["config"]))
    return parse_recipe(values.config)


def _shipped(path: str) -> str:
    """The recipe configs/X.py that an installed package brings along; other paths, and unknown ones, as they are."""
    folder, name = os.path.split(path)
    found = importlib.util.find_spec("larp_jax.configs") if folder == "configs" else None
    places = found.submodule_search_locations if found and found.submodule_search_locations else ()
    return next((file for place in places if os.path.isfile(file := os.path.join(place, name))), path)


def _set_by_name(config, overrides: Sequence[str]) -> list[str]:
    """Sets numbers under names of the user's, such as those of `optim.multipliers`: new ones too, with `/` or `.`.

    Returns:
      The overrides that are left.
    """
    from larp_jax.config import named_numbers

    starts = {f"--config.{name}.": name.split(".") for name in named_numbers(config.get("stage"))}
    left, rest = [], list(overrides)
    while rest:
        text = rest.pop(0)
        start = next((start for start in starts if text.startswith(start)), None)
        if start is None:
            left.append(text)
            continue
        name, equals, value = text.partition("=")
        if not equals and rest:
            value = rest.pop(0)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not name.removeprefix(start):
            raise InputError(f"{name}={value} must be NAME=NUMBER")
        _check_name(config, starts[start])
        holder = functools.reduce(lambda x, key: x[key], starts[start], config)
        with holder.unlocked(), holder.ignore_type():
            holder[name.removeprefix(start).replace(".", "/")] = number
    return left


def _check_name(config, keys: Sequence[str]) -> None:
    """`InputError` unless these keys, one below the other, lead to a setting."""
    from larp_jax.config import unknown_key

    name = "config"
    for key in keys:
        if not hasattr(config, "keys"):
            raise InputError(f"{name} is one value, it has no {name}.{key}")
        name = f"{name}.{key}"
        if key not in config:
            raise InputError(unknown_key(name, key, config))
        config = config[key]


# ------------------------------------------------------------------------------------------------------------ logging


class _Lines(logging.Handler):
    """Messages as plain lines on standard error, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(printable(f"{prefix}{record.getMessage()}"), file=sys.stderr)


class _Printable:
    """Standard output on which nothing that is printed moves the cursor or the like, see `larp_jax.errors.printable`.

    Messages on standard error pass `_Lines` and `_complain` instead: progress bars do move the cursor there.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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


# ----------------------------------------------------------------------------------------------------------- commands


def _train(arguments):
    from larp_jax.training import train

    recipe = _load_recipe(arguments)
    scores = train.train(recipe, arguments.workdir)
    print(f"trained to step {recipe.steps}, in {arguments.workdir}")
    _print_table(scores)


def _evaluate(arguments):
    import larp_jax

    if arguments.output:
        files.check_output(arguments.output, ours=_is_evaluation)
    same = ("metrics", "tokenizer", "protocol", "training_data", "max_clips", "weights", "lpips", "i3d", "samples")
    same += ("seed", "precision", "batch_size")
    result = larp_jax.evaluate(
        arguments.checkpoint,
        arguments.data,
        options=_sampling_options(arguments),
        progress=True,
        **{name: getattr(arguments, name) for name in same},
    )
    scores = result["metrics"]
    _print_table({"clips": result["protocol"]["clips"], **scores})
    wrong = [name for name, score in scores.items() if not math.isfinite(score)]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: no finite number; the weights of {arguments.checkpoint} are damaged")
    if arguments.output and distributed.is_first():
        files.write_json(arguments.output, result)
        print(f"written to {arguments.output}")


def _is_evaluation(path) -> bool:
    values = files.json_object(path)
    return isinstance(values.get("metrics"), dict) and isinstance(values.get("protocol"), dict)


def _analyze(arguments):
    from larp_jax import api
    from larp_jax.tools import analysis

    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights)
    result = analysis.analyze(
        found,
        arguments.data,
        arguments.output,
        max_clips=arguments.max_clips,
        ablated_clips=arguments.ablated_clips,
        replace=arguments.replace,
        batch_size=arguments.batch_size,
    )
    _print_table(result["summary"])
    print(f"written to {arguments.output}")


def _reconstruct(arguments):
    from larp_jax import api
    from larp_jax.inference import reconstruct

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights)
    reconstruct.reconstruct(
        tokenizer, arguments.input, arguments.output, max_clips=arguments.max_clips, batch_size=arguments.batch_size
    )


def _tokenize(arguments):
    from larp_jax import api
    from larp_jax.inference import tokens

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights)
    manifest = tokens.tokenize(
        tokenizer,
        arguments.input,
        arguments.output,
        max_clips=arguments.max_clips,
        windows=arguments.windows,
        flips=arguments.flips,
        cond_frames=arguments.cond_frames,
        batch_size=arguments.batch_size,
    )
    videos = len({row["source"] for row in manifest["rows"]})
    skipped = f", {len(manifest['skipped'])} skipped" if manifest["skipped"] else ""
    print(f"{len(manifest['rows'])} clips of {videos} videos{skipped}, in {arguments.output}")


def _detokenize(arguments):
    from larp_jax import api
    from larp_jax.inference import tokens

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights)
    written = tokens.detokenize(tokenizer, arguments.input, arguments.output, batch_size=arguments.batch_size)
    print(f"{len(written)} videos, in {arguments.output}")


def _load_pair(arguments):
    """Generator and tokenizer of the command."""
    from larp_jax import api
    from larp_jax.inference.generate import load_pair

    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind="generator")
    return load_pair(found, arguments.tokenizer, weights=arguments.weights, precision=arguments.precision)


def _sampling_options(arguments):
    """What the command has of them."""
    import dataclasses

    from larp_jax.models.sampling import SamplingOptions

    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    return SamplingOptions(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def _sample(arguments):
    from larp_jax.inference import generate

    options = _sampling_options(arguments)
    generator, tokenizer = _load_pair(arguments)
    if generator.config.frame_prediction:
        raise InputError(f"{arguments.checkpoint} predicts frames; use larp-jax predict, or give one of classes")
    manifest = generate.sample(
        generator,
        tokenizer,
        arguments.output,
        counts=_counts_of_classes(arguments, generator),
        seed=arguments.seed,
        options=options,
        batch_size=arguments.batch_size,
    )
    print(f"{len(manifest['rows'])} videos, in {arguments.output}; {generate.SHEET} shows the first")


def _counts_of_classes(arguments, generator) -> dict[int, int]:
    """How many to sample of each class."""
    from larp_jax.inference.generate import as_in_training, read_classes, spread

    classes, number = generator.config.num_classes, arguments.num
    wanted = {} if arguments.classes is None else read_classes(arguments.classes, generator)
    if any(wanted.values()):
        if number is not None:
            raise InputError("--num cannot be given with counts in --classes; leave it out")
        return wanted
    number = 16 if number is None else number
    if wanted:
        return spread(number, [label in wanted for label in range(classes)])
    return as_in_training(generator, number)


def _predict(arguments):
    from larp_jax.inference import generate

    options = _sampling_options(arguments)
    generator, tokenizer = _load_pair(arguments)
    if not generator.config.frame_prediction:
        raise InputError(f"{arguments.checkpoint} is conditional on classes; use larp-jax sample, or give a predictor")
    manifest = generate.predict(
        generator,
        tokenizer,
        arguments.input,
        arguments.output,
        cond_frames=arguments.cond_frames,
        max_clips=arguments.max_clips,
        seed=arguments.seed,
        options=options,
        batch_size=arguments.batch_size,
    )
    print(f"{len(manifest['rows'])} predictions beside the truth, in {arguments.output}")


EXPORTS = ("codebook-npz", "codebook-safetensors", "huggingface", "stablehlo")


def _export(arguments):
    from larp_jax import api
    from larp_jax.weights import export

    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind=None)
    model, params = found.recipe.model, found.params.get("tokenizer")
    export.check_output(arguments.output, arguments.format)
    if arguments.format == "huggingface":
        config = found.recipe if params is not None else model
        export.export_huggingface(arguments.output, config, found.params)
    elif params is None:
        raise InputError(f"{arguments.checkpoint} holds a generator, which exports as huggingface only")
    elif arguments.format == "stablehlo":
        export.export_stablehlo(arguments.output, model, params, step=found.step)
    else:
        write = {
            "codebook-npz": export.export_codebook_npz,
            "codebook-safetensors": export.export_codebook_safetensors,
        }[arguments.format]
        write(arguments.output, model, params, step=found.step, usage_counts=found.code_counts)
    print(f"{arguments.format} of step {found.step} written to {arguments.output}")


def _import(arguments):
    if (arguments.heads is None) == (arguments.kind == "lpips"):
        raise InputError("import needs --heads FILE with --kind lpips, and only with it")
    if arguments.ema and arguments.kind != "model":
        raise InputError(f"--ema is for models, not for {arguments.kind}; leave it out")
    if arguments.kind == "model":
        _import_model(arguments)
        return
    from larp_jax.weights import perceptual

    perceptual.check_output(arguments.output, arguments.kind)
    sources = [arguments.source] if arguments.heads is None else [arguments.source, arguments.heads]
    read = {"lpips": perceptual.import_lpips, "i3d": perceptual.import_i3d}[arguments.kind]
    perceptual.save(arguments.output, arguments.kind, read(*sources), sources)
    print(f"{arguments.kind} imported into {arguments.output}")


def _import_model(arguments):
    from larp_jax.config import GeneratorRecipe, to_dict
    from larp_jax.weights import checkpoint, importing

    files.check_new_folder(arguments.output)
    kind, recipe, params = importing.import_huggingface(arguments.source, ema=arguments.ema)
    if kind == "generator":
        recipe = GeneratorRecipe(model=recipe)
    checkpoint.write_imported(arguments.output, to_dict(recipe), params)
    print(f"{kind} imported into {arguments.output}")


def _prepare(arguments):
    from larp_jax.data import prepare
    from larp_jax.data.prepare_report import format_report

    report = prepare.prepare(
        arguments.input,
        arguments.output,
        prepare.Settings(arguments.size, arguments.storage, arguments.quality),
        root=arguments.root,
        workers=arguments.workers,
        beam_options=arguments.beam_options,
        estimate_only=arguments.estimate,
        say=lambda text: print(text, flush=True),
    )
    if report:
        print(format_report(report))


def _benchmark(arguments):
    from larp_jax import data
    from larp_jax.models.sampling import SamplingOptions
    from larp_jax.tools import benchmark

    recipe = _load_recipe(arguments)
    stage = "generator" if arguments.what == "sample" else "tokenizer"
    _check_numbers(arguments)
    if recipe.stage != stage:
        raise InputError(f"benchmark {arguments.what} needs the config of a {stage}, not of a {recipe.stage}")
    if arguments.what == "train":
        result = benchmark.benchmark_train(recipe, seconds=arguments.seconds)
    elif arguments.what in ("encode", "decode"):
        result = benchmark.benchmark_codec(
            recipe,
            arguments.what,
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            seconds=arguments.seconds,
        )
    elif arguments.what == "sample":
        result = benchmark.benchmark_sample(
            recipe.model,
            SamplingOptions(cfg_scale=arguments.cfg_scale, cfg_interval=arguments.cfg_interval),
            batch_size=arguments.batch_size,
            precision=arguments.precision,
            seconds=arguments.seconds,
        )
    else:
        result = benchmark.benchmark_data(
            recipe.data.train,
            data.ClipSpec(frames=recipe.model.frames, resolution=recipe.model.resolution, flip=recipe.data.flip),
            batch_size=recipe.data.batch_size,
            workers=recipe.data.workers,
            seconds=arguments.seconds,
            model_rate=arguments.model_rate,
        )
    print(benchmark.format_table(result))
    _write_numbers(arguments, result)


def _plan(arguments):
    from larp_jax.tools import plan

    recipe = _load_recipe(arguments)
    _check_numbers(arguments)
    result = plan.plan(recipe, topology=arguments.topology, devices=arguments.devices, gpus=arguments.gpus)
    print(plan.format_table(result))
    _write_numbers(arguments, result)


def _check_numbers(arguments) -> None:
    """Checks that `_write_numbers` can write: in place of numbers of the same command at most."""
    if arguments.output:
        kind = f"larp_jax.{arguments.command}"
        files.check_output(arguments.output, ours=lambda path: files.json_object(path).get("format") == kind)


def _write_numbers(arguments, result: dict[str, Any]) -> None:
    if arguments.output:
        files.write_json(arguments.output, {"format": f"larp_jax.{arguments.command}", **result})


def _report(arguments):
    from larp_jax.tools import report

    path = report.report(arguments.workdir, arguments.output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")


def _doctor(arguments):
    from larp_jax.tools import doctor

    print(doctor.report())


def _print_table(values: dict[str, Any]) -> None:
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
