"""Arguments that commands share, the types of their values, and checks of paths."""

import argparse
import math
import re
from collections.abc import Callable
from typing import NoReturn

from larp_jax import files, hub, storage
from larp_jax.errors import InputError

CHECKPOINT = (
    "a workdir (its newest checkpoint), a checkpoint, an imported directory, a Hugging Face style directory, or"
    " hf://OWNER/NAME[@REVISION]"
)
SPEC = "tfds:NAME[/CONFIG][:SPLIT], folder:PATH or moving_shapes[:SPLIT]"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one-line `InputError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises `InputError` with the message and a pointer to the help."""
        raise InputError(f"{message}; see {self.prog} --help")


def add_command(commands, name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str) -> Parser:
    """Adds a command, which calls `run` with its arguments, and returns its parser."""
    sub = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  larp-jax {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.set_defaults(run=run)
    sub.add_argument("--debug", action="store_true", help="show the traceback of errors")
    return sub


def count(text: str) -> int:
    """An integer of at least 0."""
    value = int(text) if text.isdecimal() else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return value


def seed(text: str) -> int:
    """An integer in [0, 2^64)."""
    value = count(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is above 2^64 - 1")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = count(text)
    if not value:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def seconds(text: str) -> float:
    """A time of more than 0 seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def size(text: str) -> int | tuple[int, int]:
    """The side of a square, or a height and a width such as 72,128."""
    sides = [positive(side) for side in text.split(",")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither the side of a square nor a height and a width")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def add_config(sub, *, required=True) -> None:
    """Adds --config."""
    sub.add_argument(
        "--config", required=required, metavar="FILE[:VARIANT]",
        help="Python file with a recipe; change settings with --config.NAME=VALUE, for example --config.steps=1000",
    )  # fmt: skip


def add_checkpoint(sub) -> None:
    """Adds --checkpoint and --weights."""
    sub.add_argument("--checkpoint", required=True, metavar="P", help=CHECKPOINT)
    add_weights(sub)


def add_weights(sub) -> None:
    """Adds --weights."""
    sub.add_argument(
        "--weights", choices=("ema", "raw"), default="ema",
        help="EMA weights if the checkpoint has them, or the raw weights (default: ema)",
    )  # fmt: skip


def add_videos(sub, max_clips) -> None:
    """Adds the options of commands that read videos and write a folder; `max_clips` is a default."""
    sub.add_argument("--input", required=True, metavar="I", help=f"video file, folder of videos or pictures, or {SPEC}")
    sub.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    sub.add_argument(
        "--max-clips", type=count, default=max_clips, metavar="N",
        help=f"at most N clips, spread evenly over the data set; 0 for all (default: {max_clips})",
    )  # fmt: skip
    add_batch_size(sub)


def add_clip(sub) -> None:
    """Adds --size and --fewer-frames."""
    sub.add_argument(
        "--size", type=size, metavar="S",
        help="side of square clips, or height and width such as 72,128, that the model encodes (default: its own)",
    )  # fmt: skip
    sub.add_argument(
        "--fewer-frames", action="store_true",
        help="encode what is shorter than a clip as it is, instead of holding its last frame still",
    )


def add_budget(sub) -> None:
    """Adds --budget and --router."""
    sub.add_argument(
        "--budget", metavar="B",
        help="codes of a clip, for tokenizers with a ladder: a number in equal blocks such as 128, that of each block"
        " such as 32,64,32,32, bits=B for at most so many bits, auto for the choice of a router, or greedy:DB or"
        " greedy:lpips=D for the fewest that reach this PSNR or LPIPS (default: the most codes in equal blocks)",
    )  # fmt: skip
    sub.add_argument("--router", metavar="R", help="the router of --budget auto: a workdir or a checkpoint")


def add_batch_size(sub) -> None:
    """Adds --batch-size."""
    sub.add_argument("--batch-size", type=positive, default=8, metavar="B", help="clips per batch (default: 8)")


def add_windows(sub) -> None:
    """Adds --windows."""
    sub.add_argument(
        "--windows", type=count, default=0, metavar="W",
        help="at most W full windows per video, spread evenly over it (default: all consecutive windows)",
    )  # fmt: skip


def add_sampling(sub, what, *, clips=True) -> None:
    """Adds the options of sampling, except guidance.

    `what` is the name of a result, such as "prediction"; `clips` adds the options for whole clips.
    """
    sub.add_argument(
        "--seed", type=seed, default=0, help=f"random seed; {what} i of a seed is always the same (default: 0)"
    )
    sub.add_argument("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature (default: 1)")
    sub.add_argument(
        "--top-k", type=count, default=0, metavar="K", help="sample from the K most likely codes (default: 0, all)"
    )
    sub.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="sample from the smallest set of codes with probability above P (default: 1, all)",
    )  # fmt: skip
    if clips:
        add_window(sub)
    add_solver(sub)
    add_precision(sub)


def add_sample_budget(sub) -> None:
    """Adds --budget of commands that sample."""
    sub.add_argument(
        "--budget", default="auto", metavar="B",
        help="codes of a sample, for generators with a ladder: auto, as many as the generator decides; a number in"
        " equal blocks; or those of each block, such as 32,64,32,32 (default: auto)",
    )  # fmt: skip


def add_window(sub) -> None:
    """Adds --window."""
    sub.add_argument(
        "--window", type=positive, default=1, metavar="W",
        help="find up to W codes in a pass, for the same samples; see benchmark sample (default: 1)",
    )  # fmt: skip


def add_solver(sub) -> None:
    """Adds --solver and --solver-steps."""
    sub.add_argument(
        "--solver", choices=("euler", "heun"), default="euler", help="how a flow generator samples (default: euler)"
    )
    sub.add_argument(
        "--solver-steps", type=positive, default=100, metavar="N", help="number of its steps (default: 100)"
    )


def add_precision(sub) -> None:
    """Adds --precision."""
    sub.add_argument(
        "--precision", choices=("float32", "bfloat16", "int8"), default="float32",
        help="compute precision; int8 is that of a generator's weights (default: float32)",
    )  # fmt: skip


def add_guidance(sub, default, *, clips=True) -> None:
    """Adds the options of classifier-free guidance; `default` is that of the scale.

    `clips` adds the option for whole clips.
    """
    sub.add_argument(
        "--cfg-scale", type=float, default=default, metavar="S",
        help=f"classifier-free guidance scale; 1 turns guidance off (default: {default:g})",
    )  # fmt: skip
    sub.add_argument(
        "--frames-scale", type=float, default=1.0, metavar="S",
        help="guidance scale of the given frames, for generators trained with model.frames_dropout (default: 1)",
    )  # fmt: skip
    if clips:
        sub.add_argument(
            "--cfg-interval", type=int, default=-1, metavar="I", help="guide only the first I + 2 codes (default: all)"
        )


def add_processes(sub) -> None:
    """Adds the options of multi-process runs."""
    group = sub.add_argument_group(
        "multi-process runs", "give these to every process; TPU pods, srun and mpirun need none of them"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    group.add_argument("--num-processes", type=positive, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=count, metavar="I", help="index of this process, from 0")


# Options that are paths, and options that may contain one: data sets, a repository, a recipe and its settings.
PATHS = ("workdir", "checkpoint", "tokenizer", "generator", "router", "output", "samples")  # may be in a bucket
MODELS = ("checkpoint", "tokenizer", "generator", "router", "source")  # may be repositories of the hub
_READS_BUCKETS = re.compile("(tokens|rewards):gs://")  # data sets that this program wrote
MODEL_SETTINGS = ("--config.init_from=", "--config.tokenizer=")  # likewise
LOCAL_PATHS = ("lpips", "i3d", "heads", "root", "probe", "teacher")
TEXTS = ("config", "router_config", "overrides", "data", "training_data", "input", "source", "drift")
FOLDER_WRITERS = (
    "analyze", "reconstruct", "tokenize", "detokenize", "allocate", "sample", "predict", "stream", "prepare"
)  # fmt: skip


def _allowed(name: str, text: str) -> tuple[str, ...]:
    """The schemes that a text may contain: gs:// of weights and codes, which this program wrote, but not of videos."""
    if name == "overrides" and text.startswith(MODEL_SETTINGS):
        return storage.SCHEME, hub.SCHEME
    written = name == "overrides" and not text.startswith("--config.data.")
    return (storage.SCHEME,) if name == "source" or _READS_BUCKETS.search(text) or written else ()


def check_paths(arguments: argparse.Namespace) -> None:
    """Expands `~` in every path and rejects URLs and unusable output folders, before any work starts."""
    written = PATHS + (("input",) if arguments.command == "detokenize" else ())
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if name in MODELS and value is not None and hub.is_hub(value):
            hub.parse(value, option)
        elif name in written and value is not None:
            setattr(arguments, name, str(files.any_path(value, option)))
        elif name in LOCAL_PATHS and value is not None:
            setattr(arguments, name, str(files.local_path(value, option)))
        elif name in TEXTS and value is not None:
            for text in [value] if isinstance(value, str) else value:
                what = "setting" if name == "overrides" else option
                storage.refuse_url(text, what, allowed=_allowed(name, text))
    for name in ("workdir", "samples"):
        if getattr(arguments, name, None) and arguments.command != "report":
            files.check_folder(getattr(arguments, name), f"--{name}")
    if arguments.command in FOLDER_WRITERS:
        files.check_folder(arguments.output)
