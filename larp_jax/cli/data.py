"""The command prepare."""

from larp_jax.cli.arguments import SPEC, add_command, count, size


def add_prepare(commands) -> None:
    """Adds the command prepare."""
    sub = add_command(
        commands,
        "prepare",
        _prepare,
        "convert videos to a data set of frames at training size, which training reads many times faster",
        "--input videos --output prepared --size 128\n"
        "  larp-jax prepare --input ucfTrainTestlist --root UCF-101 --output prepared/ucf101\n"
        "  then train with --config.data.train=tfds:prepared:train",
    )
    sub.add_argument(
        "--input", required=True, nargs="+", metavar="I",
        help="folder of videos, which are files or folders of pictures (subfolders are classes, or splits if called"
        " train, val or test), CSV files (path, label; the authors' or Kinetics' columns), the folder of UCF101's lists"
        f", or {SPEC}",
    )  # fmt: skip
    sub.add_argument("--output", required=True, metavar="DIR", help="new folder; run again to continue")
    sub.add_argument(
        "--root", metavar="DIR", help="folder that the paths in lists are relative to (default: the folder of the list)"
    )
    sub.add_argument(
        "--size", type=size, default=128, metavar="S",
        help="side of square frames, or height and width such as 72,128 (default: 128)",
    )
    sub.add_argument(
        "--storage", choices=("jpeg", "raw", "h264"), default="jpeg", help="storage format of frames (default: jpeg)"
    )
    sub.add_argument(
        "--quality", type=count, metavar="Q", help="1 (best) to 31 for jpeg (default: 2), a CRF for h264 (default: 14)"
    )
    sub.add_argument(
        "--workers", type=count, default=0, metavar="N", help="number of processes (default: one per core)"
    )
    sub.add_argument("--estimate", action="store_true", help="only estimate the size of the data set")
    sub.add_argument(
        "--beam-options", metavar="O",
        help='write the shards on a cluster with Apache Beam, for example "--runner=DirectRunner"',
    )  # fmt: skip


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
        progress=lambda text: print(text, flush=True),
    )
    if report:
        print(format_report(report))
