"""The commands evaluate and analyze."""

import math

from larp_jax import files
from larp_jax.cli.arguments import (
    SPEC,
    add_batch_size,
    add_budget,
    add_checkpoint,
    add_command,
    add_guidance,
    add_processes,
    add_sampling,
    count,
)
from larp_jax.cli.inference import sampling_options
from larp_jax.cli.output import print_table
from larp_jax.errors import InputError
from larp_jax.runtime import distributed


def add_evaluate(commands) -> None:
    """Adds the command evaluate."""
    sub = add_command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate the reconstructions of a tokenizer or the samples of a generator",
        "--checkpoint runs/quickstart --data moving_shapes:test --output evaluation.json",
    )
    add_checkpoint(sub)
    sub.add_argument("--data", required=True, metavar="SPEC", help=SPEC)
    sub.add_argument(
        "--metrics", type=lambda text: text.split(","), metavar="A,B",
        help="comma-separated. Tokenizers: psnr, ssim, lpips, rfvd, usage, prior; generators: fvd, cross_entropy"
        " (default: all that apply and need no extra network)",
    )  # fmt: skip
    sub.add_argument("--lpips", metavar="FILE", help="weights of LPIPS, written by larp-jax import --kind lpips")
    sub.add_argument("--i3d", metavar="FILE", help="weights of I3D, written by larp-jax import --kind i3d")
    sub.add_argument(
        "--protocol", choices=("held_out", "larp_ucf101", "larp_ucf101_generation", "larp_k600_prediction"),
        help="choose the clips by a named protocol, see docs/evaluation.md (default: all windows of the test split)",
    )  # fmt: skip
    sub.add_argument(
        "--training-data", metavar="SPEC",
        help="for held_out: training data to exclude (default: as named in the checkpoint)",
    )  # fmt: skip
    sub.add_argument("--output", metavar="FILE", help="JSON file for the metrics and their protocol")
    sub.add_argument("--max-clips", type=count, default=0, metavar="N", help="at most N clips; 0 for all (default)")
    add_budget(sub)
    add_batch_size(sub)
    generators = sub.add_argument_group("generators")
    generators.add_argument("--tokenizer", metavar="P", help="the tokenizer that the generator was trained with")
    generators.add_argument(
        "--samples", metavar="DIR", help="for fvd: folder to keep sampled codes in; resumes from the codes there"
    )
    add_guidance(generators, 1.0)
    add_sampling(generators, "sample")
    add_processes(sub)


def _evaluate(arguments):
    import larp_jax

    if arguments.output:
        files.check_output(arguments.output, ours=_is_evaluation)
    same = ("metrics", "tokenizer", "protocol", "training_data", "max_clips", "weights", "lpips", "i3d", "samples")
    same += ("budget", "router", "seed", "precision", "batch_size")
    result = larp_jax.evaluate(
        arguments.checkpoint,
        arguments.data,
        options=sampling_options(arguments),
        progress=True,
        **{name: getattr(arguments, name) for name in same},
    )
    scores = result["metrics"]
    print_table({"clips": result["protocol"]["clips"], **scores})
    wrong = [name for name, score in scores.items() if not math.isfinite(score)]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: no finite number; the weights of {arguments.checkpoint} are damaged")
    if arguments.output and distributed.is_first():
        files.write_json(arguments.output, result)
        print(f"written to {arguments.output}")


def _is_evaluation(path) -> bool:
    values = files.json_object(path)
    return isinstance(values.get("metrics"), dict) and isinstance(values.get("protocol"), dict)


def add_analyze(commands) -> None:
    """Adds the command analyze."""
    sub = add_command(
        commands,
        "analyze",
        _analyze,
        "find out what each token position encodes",
        "--checkpoint runs/quickstart --data moving_shapes:test --output runs/quickstart/analysis",
    )
    add_checkpoint(sub)
    sub.add_argument("--data", required=True, metavar="SPEC", help=SPEC)
    sub.add_argument("--output", required=True, metavar="DIR", help="folder for numbers and images")
    sub.add_argument(
        "--max-clips", type=count, default=256, metavar="N",
        help="clips for the statistics of codes; 0 for all (default: 256)",
    )  # fmt: skip
    sub.add_argument(
        "--ablated-clips", type=count, default=16, metavar="N",
        help="clips in which codes are replaced; each costs one decoding per position (default: 16)",
    )  # fmt: skip
    sub.add_argument(
        "--budget", metavar="B",
        help="codes of every clip, for tokenizers with a ladder: 128, 32,64,32,32 or bits=B (default: the most codes in"
        " equal blocks)",
    )  # fmt: skip
    sub.add_argument(
        "--replace", choices=("other", "common"), default="other",
        help="replace a code by that of another clip or by the most common one at the same position (default: other)",
    )  # fmt: skip
    add_batch_size(sub)


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
        budget=arguments.budget,
        replace=arguments.replace,
        batch_size=arguments.batch_size,
    )
    print_table(result["summary"])
    print(f"written to {arguments.output}")
