"""The command prepare."""

from larp_jax.cli.arguments import SPEC, add_command, count, positive


def add_prepare(commands) -> None:
    """Adds the command prepare."""
    sub = add_command(
        commands,
        "prepare",
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
    sub.add_argument("--size", type=positive, default=128, metavar="S", help="side of the frames (default: 128)")
    sub.add_argument("--storage", choices=("jpeg", "raw", "h264"), default="jpeg", help="of frames (default: jpeg)")
    sub.add_argument(
        "--quality", type=count, metavar="Q", help="1 (best) to 31 for jpeg (default: 2), a CRF for h264 (default: 14)"
    )
    sub.add_argument("--workers", type=count, default=0, metavar="N", help="processes (default: one a core)")
    sub.add_argument("--estimate", action="store_true", help="only say how large it would be")
    sub.add_argument(
        "--beam-options", metavar="O", help='make it on a cluster by Apache Beam, as in "--runner=DirectRunner"'
    )


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
