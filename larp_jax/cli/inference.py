"""The commands reconstruct, tokenize, detokenize, allocate, features, sample, predict and stream."""

from larp_jax.cli.arguments import (
    CHECKPOINT,
    SPEC,
    add_batch_size,
    add_budget,
    add_checkpoint,
    add_clip,
    add_command,
    add_config,
    add_guidance,
    add_processes,
    add_sample_budget,
    add_sampling,
    add_videos,
    add_weights,
    add_windows,
    count,
    positive,
)
from larp_jax.cli.output import print_table
from larp_jax.errors import InputError


def add_reconstruct(commands) -> None:
    """Adds the command reconstruct."""
    sub = add_command(
        commands,
        "reconstruct",
        _reconstruct,
        "write videos next to their reconstructions, with PSNR",
        "--checkpoint runs/quickstart --input videos --output reconstructions",
    )
    add_checkpoint(sub)
    add_videos(sub, max_clips=8)
    add_budget(sub)
    sub.add_argument(
        "--fit", choices=("resize", "tile", "crop"), default="resize",
        help="how frames of files meet the model's clips: squeeze whole frames to them, cover them with tiles at their"
        " own size, or crop the center (default: resize)",
    )  # fmt: skip
    add_clip(sub)


def _reconstruct(arguments):
    from larp_jax import api
    from larp_jax.inference import reconstruct

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights, router=arguments.router)
    reconstruct.reconstruct(
        tokenizer,
        arguments.input,
        arguments.output,
        fit=arguments.fit,
        size=arguments.size,
        fewer_frames=arguments.fewer_frames,
        budget=arguments.budget,
        max_clips=arguments.max_clips,
        batch_size=arguments.batch_size,
    )


def add_tokenize(commands) -> None:
    """Adds the command tokenize."""
    sub = add_command(
        commands,
        "tokenize",
        _tokenize,
        "encode videos to codes on disk",
        "--checkpoint runs/quickstart --input folder:videos --output codes",
    )
    add_checkpoint(sub)
    add_videos(sub, max_clips=0)
    add_budget(sub)
    add_windows(sub)
    sub.add_argument("--flips", action="store_true", help="also encode every window mirrored left to right")
    sub.add_argument(
        "--cond-frames", type=count, default=0, metavar="F",
        help="also write the condition codes for frame prediction from F frames; with a ladder 1: also encode every"
        " window after its first frame held still for a block, as predict gives a picture",
    )  # fmt: skip
    add_clip(sub)


def _tokenize(arguments):
    from larp_jax import api
    from larp_jax.inference import tokenize

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights, router=arguments.router)
    manifest = tokenize.tokenize(
        tokenizer,
        arguments.input,
        arguments.output,
        max_clips=arguments.max_clips,
        windows=arguments.windows,
        flips=arguments.flips,
        cond_frames=arguments.cond_frames,
        size=arguments.size,
        fewer_frames=arguments.fewer_frames,
        budget=arguments.budget,
        batch_size=arguments.batch_size,
    )
    videos = len({row["source"] for row in manifest["rows"]})
    skipped = f", {len(manifest['skipped'])} skipped" if manifest["skipped"] else ""
    used = f", {manifest['mean_codes']:g} codes each on average" if "mean_codes" in manifest else ""
    print(f"{len(manifest['rows'])} clips of {videos} videos{used}{skipped}, in {arguments.output}")


def add_detokenize(commands) -> None:
    """Adds the command detokenize."""
    sub = add_command(
        commands,
        "detokenize",
        _detokenize,
        "decode codes on disk to videos",
        "--checkpoint runs/quickstart --input codes --output videos_again",
    )
    add_checkpoint(sub)
    sub.add_argument("--input", required=True, metavar="DIR", help="folder that tokenize wrote")
    sub.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    add_batch_size(sub)


def _detokenize(arguments):
    from larp_jax import api
    from larp_jax.inference import tokenize

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights)
    written = tokenize.detokenize(tokenizer, arguments.input, arguments.output, batch_size=arguments.batch_size)
    print(f"{len(written)} videos, in {arguments.output}")


def add_allocate(commands) -> None:
    """Adds the command allocate."""
    sub = add_command(
        commands,
        "allocate",
        _allocate,
        "measure clips with every number of codes, and find the best, from which a router learns",
        "--checkpoint runs/adaptive --data moving_shapes/busy:train --output runs/adaptive_rewards",
    )
    add_checkpoint(sub)
    sub.add_argument("--data", required=True, metavar="SPEC", help=f"{SPEC}; the split train by default")
    sub.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write to; an interrupted call continues there"
    )
    sub.add_argument(
        "--metric", choices=("lpips", "psnr", "mse", "rmse"),
        help="quality in rewards: mse is the squared error, rmse its root (default: lpips if its weights are found)",
    )  # fmt: skip
    sub.add_argument("--lpips", metavar="FILE", help="weights of LPIPS (default: where larp-jax doctor looks)")
    sub.add_argument(
        "--quality-weight", type=float, default=1.2, metavar="W", help="how much quality counts (default: 1.2)"
    )
    sub.add_argument("--length-weight", type=float, default=0.8, metavar="W", help="how much codes cost (default: 0.8)")
    sub.add_argument(
        "--max-clips", type=count, default=0, metavar="N",
        help="at most N clips, spread evenly over the data set; 0 for all (default)",
    )  # fmt: skip
    add_batch_size(sub)
    add_processes(sub)


def _allocate(arguments):
    from larp_jax import api
    from larp_jax.inference import allocate

    tokenizer = api.load_tokenizer(arguments.checkpoint, weights=arguments.weights)
    names = ("metric", "quality_weight", "length_weight", "lpips", "max_clips", "batch_size")
    manifest = allocate.allocate(
        tokenizer, arguments.data, arguments.output, **{name: getattr(arguments, name) for name in names}
    )
    if manifest:  # the other hosts have none
        found = manifest["statistics"]
        lengths = ",".join(map(str, found["uniform"].pop("lengths")))
        print_table({f"best_{name}": x for name, x in found["best"].items()})
        print_table({f"uniform_{name}": x for name, x in found["uniform"].items()})
        print(f"{found['clips']} clips, the best uniform assignment is {lengths}; in {arguments.output}")


def add_features(commands) -> None:
    """Adds the command features."""
    sub = add_command(
        commands,
        "features",
        _features,
        "write clips with the features of a frozen network, which training then need not compute",
        "--config configs/quickstart.py --teacher vgg16 --windows 4 --output features\n"
        "  then train with --config.loss.alignment_weight=0.7 --config.loss.alignment=vgg16"
        " --config.loss.alignment_layer=1 --config.data.train=features:features",
    )
    add_config(sub)
    sub.add_argument(
        "--teacher", metavar="T", help="the network, by name or by the path of its file (default: loss.alignment)"
    )
    sub.add_argument("--data", metavar="SPEC", help=f"{SPEC}; the split train by default (default: data.train)")
    sub.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write to; an interrupted call continues there"
    )
    add_windows(sub)
    sub.add_argument(
        "--flips", action="store_true", help="also write every window mirrored left to right (default: as data.flip)"
    )
    add_batch_size(sub)
    add_processes(sub)


def _features(arguments):
    from larp_jax.cli.recipe import load_recipe
    from larp_jax.inference import features

    recipe = load_recipe(arguments)
    if recipe.stage != "tokenizer":
        raise InputError(f"--config {arguments.config} is of a {recipe.stage}; give the recipe of a tokenizer")
    manifest = features.write_features(
        recipe,
        arguments.output,
        teacher=arguments.teacher,
        spec=arguments.data,
        windows=arguments.windows,
        flips=arguments.flips or recipe.data.flip,
        batch_size=arguments.batch_size,
    )
    if manifest:  # the other hosts have none
        videos = len({row["video"] for row in manifest["rows"]})
        print(f"{len(manifest['rows'])} clips of {videos} videos, in {arguments.output}")


def _add_pair(sub) -> None:
    """Adds the options that name the models and the output."""
    sub.add_argument("--checkpoint", required=True, metavar="G", help=f"the generator: {CHECKPOINT}")
    sub.add_argument(
        "--tokenizer", required=True, metavar="P", help="the tokenizer that the generator was trained with"
    )
    add_weights(sub)
    sub.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write to; an interrupted call continues there"
    )


def _add_generation(sub, what) -> None:
    """Adds the options that sample and predict share. `what` is the name of a result."""
    _add_pair(sub)
    add_sampling(sub, what)
    add_batch_size(sub)
    add_processes(sub)


def _load_pair(arguments):
    """The generator and its tokenizer, on the devices of this host, because each host samples on its own."""
    from larp_jax import api
    from larp_jax.inference.generate import load_pair

    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind="generator")
    return load_pair(found, arguments.tokenizer, weights=arguments.weights, precision=arguments.precision)


def sampling_options(arguments):
    """The `SamplingOptions` that the command has arguments for; defaults for the others."""
    import dataclasses

    from larp_jax.models.sampling import SamplingOptions

    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    return SamplingOptions(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


def add_sample(commands) -> None:
    """Adds the command sample."""
    sub = add_command(
        commands,
        "sample",
        _sample,
        "sample videos, by class if the generator has classes",
        "--checkpoint runs/generator --tokenizer runs/ucf101 --classes 0,3 --num 16 --cfg-scale 1.25 --output samples",
    )
    _add_generation(sub, "sample")
    sub.add_argument(
        "--classes", metavar="C",
        help="by number or name: 0,walk splits --num evenly; 0:100,walk:50 gives the count of each. Default: class"
        " frequencies of the training data if known, else uniform",
    )  # fmt: skip
    sub.add_argument("--num", type=positive, metavar="N", help="total number of videos (default: 16)")
    add_sample_budget(sub)
    add_guidance(sub, 1.0)


def _sample(arguments):
    from larp_jax.data.codes import describe_class_codes
    from larp_jax.inference import generate

    options = sampling_options(arguments)
    generator, tokenizer = _load_pair(arguments)
    if generator.config.has_frames and not generator.config.has_null_frames:
        raise InputError(
            f"{arguments.checkpoint} needs given frames; use larp-jax predict, or give a generator that was trained"
            " without them, or with model.frames_dropout"
        )
    manifest = generate.sample(
        generator,
        tokenizer,
        arguments.output,
        counts=_counts_of_classes(arguments, generator),
        seed=arguments.seed,
        options=options,
        batch_size=arguments.batch_size,
        budget=arguments.budget,
    )
    print(f"{len(manifest['rows'])} videos, in {arguments.output}; {generate.SHEET} shows the first")
    if "class_codes" in manifest:
        print(f"mean number of codes: {describe_class_codes(manifest)}")


def _counts_of_classes(arguments, generator) -> dict[int, int]:
    """The number of videos to sample, by class."""
    from larp_jax.inference.generate import as_in_training, read_classes, split_in_proportion

    classes, number = generator.config.num_classes, arguments.num
    wanted = {} if arguments.classes is None else read_classes(arguments.classes, generator)
    if any(wanted.values()):
        if number is not None:
            raise InputError("--num cannot be given with counts in --classes; leave it out")
        return wanted
    number = 16 if number is None else number
    if wanted:
        return split_in_proportion(number, [label in wanted for label in range(classes)])
    return as_in_training(generator, number)


def add_predict(commands) -> None:
    """Adds the command predict."""
    sub = add_command(
        commands,
        "predict",
        _predict,
        "predict how videos continue after their first frames",
        "--checkpoint runs/predictor --tokenizer runs/k600 --input video.mp4 --cond-frames 5 --output predictions",
    )
    _add_generation(sub, "prediction")
    sub.add_argument(
        "--input", required=True, metavar="I", help=f"video file, picture, folder of videos or pictures, or {SPEC}"
    )
    sub.add_argument("--classes", metavar="C", help="class of what follows, by number or name (default: any)")
    sub.add_argument(
        "--cond-frames", type=positive, metavar="F",
        help="number of given frames (default: 5); with a ladder 1, a picture, or those of whole blocks (default: one)",
    )  # fmt: skip
    add_sample_budget(sub)
    add_guidance(sub, 1.0)
    sub.add_argument(
        "--max-clips",
        type=count,
        default=8,
        metavar="N",
        help="at most N clips, spread evenly over the data set; 0 for all (default: 8)",
    )


def _predict(arguments):
    from larp_jax.inference import generate

    options = sampling_options(arguments)
    generator, tokenizer = _load_pair(arguments)
    config = generator.config
    if not config.has_frames and not config.ladder:
        raise InputError(
            f"{arguments.checkpoint} is class-conditional; use larp-jax sample, or give a generator trained for frame"
            " prediction"
        )
    label = None
    if arguments.classes is not None:
        (label, number), *more = generate.read_classes(arguments.classes, generator).items()
        if more or number:
            raise InputError(f"--classes: predict takes one class, for all clips; got {arguments.classes!r}")
    manifest = generate.predict(
        generator,
        tokenizer,
        arguments.input,
        arguments.output,
        cond_frames=arguments.cond_frames or (tokenizer.config.frames // config.blocks if config.ladder else 5),
        label=label,
        max_clips=arguments.max_clips,
        seed=arguments.seed,
        options=options,
        batch_size=arguments.batch_size,
        budget=arguments.budget,
    )
    print(f"{len(manifest['rows'])} predictions next to the originals, in {arguments.output}")


def add_stream(commands) -> None:
    """Adds the command stream."""
    sub = add_command(
        commands,
        "stream",
        _stream,
        "sample a video of any length, block after block",
        "--checkpoint runs/adaptive_generator --tokenizer runs/adaptive --frames 1000 --classes 0:200,6:200"
        " --output stream",
    )
    _add_pair(sub)
    sub.add_argument("--frames", type=positive, required=True, metavar="N", help="number of frames")
    sub.add_argument(
        "--classes", metavar="C",
        help="a class by number or name; or classes with frames, such as 0:200,walk:200, which begin again at the end"
        " (default: any class)",
    )  # fmt: skip
    sub.add_argument(
        "--context", type=positive, metavar="N",
        help="how many blocks of frames each clip takes over from the one before, encoded again (default: 1); without a"
        " ladder, how many frames (default: as in training)",
    )  # fmt: skip
    sub.add_argument(
        "--input", metavar="I",
        help="video file or picture that the stream goes on from, from as many first frames as the context has",
    )  # fmt: skip
    add_sampling(sub, "block", clips=False)
    add_sample_budget(sub)
    add_guidance(sub, 1.0, clips=False)
    drift = sub.add_argument_group("drift")
    drift.add_argument(
        "--drift", metavar="SPEC",
        help="instead of a video, write how streams of the classes of real clips change as they go on, beside streams"
        f" that go on from the clips; {SPEC}, the split test by default",
    )  # fmt: skip
    drift.add_argument("--probe", metavar="FILE", help="probe.npz of an experiment on such clips, to measure more")
    drift.add_argument(
        "--max-clips", type=positive, default=64, metavar="N", help="at most N streams (default: 64)"
    )
    add_batch_size(drift)


def _stream(arguments):
    from larp_jax import api
    from larp_jax.inference import stream

    options = sampling_options(arguments)
    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind="generator")
    generator = api.LoadedGenerator.of(found, precision=arguments.precision)
    tokenizer = api.load_tokenizer(arguments.tokenizer, weights=arguments.weights)
    if arguments.drift is not None:
        _drift(arguments, generator, tokenizer)
        return
    schedule = None
    if arguments.classes is not None:
        size = stream.pace(generator, tokenizer, arguments.context).size
        schedule = stream.read_schedule(arguments.classes, generator, size)
    manifest = stream.write_stream(
        generator,
        tokenizer,
        arguments.output,
        frames=arguments.frames,
        schedule=schedule,
        seed=arguments.seed,
        options=options,
        context=arguments.context,
        source=arguments.input,
        budget=arguments.budget,
    )
    print(f"{manifest['frames']} frames in {len(manifest['parts'])} part(s), in {arguments.output}")


def _drift(arguments, generator, tokenizer):
    from larp_jax.tools import drift

    if arguments.classes is not None:
        raise InputError("--drift samples the classes of the clips; leave out --classes")
    if arguments.input is not None:
        raise InputError("--drift has streams that begin with nothing; leave out --input")
    result = drift.drift(
        generator,
        tokenizer,
        arguments.drift,
        arguments.output,
        frames=arguments.frames,
        videos=arguments.max_clips,
        seed=arguments.seed,
        options=sampling_options(arguments),
        context=arguments.context,
        budget=arguments.budget,
        probe=arguments.probe,
        batch_size=arguments.batch_size,
    )
    for when, window in (("first", result["stream"][0]), ("last", result["stream"][-1])):
        print_table({f"{when}_{name}": x for name, x in window.items() if name != "start"})
    print(f"{len(result['stream'])} windows of {result['videos']} streams, in {arguments.output}")
