"""The commands evaluate and analyze."""

import importlib.metadata
import math
import os
from collections.abc import Sequence

from larp_jax import files
from larp_jax.cli.arguments import (
    SPEC,
    add_batch_size,
    add_checkpoint,
    add_command,
    add_guidance,
    add_processes,
    add_sampling,
    count,
)
from larp_jax.cli.inference import load_pair, sampling_options
from larp_jax.cli.output import print_table
from larp_jax.errors import InputError
from larp_jax.runtime import distributed
from larp_jax.version import __version__


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
    from larp_jax import api

    if arguments.training_data and arguments.protocol != "held_out":
        raise InputError("--training-data is for --protocol held_out; leave it out")
    if arguments.output:
        files.check_output(arguments.output, ours=_is_evaluation)
    found = api.load_checkpoint(arguments.checkpoint, weights=arguments.weights, kind=None)
    {"tokenizer": _evaluate_tokenizer, "generator": _evaluate_generator}[found.recipe.stage](arguments, found)


def _evaluate_tokenizer(arguments, found):
    import jax

    from larp_jax import api
    from larp_jax.config import MeshConfig
    from larp_jax.evaluation import evaluators, fvd
    from larp_jax.runtime import sharding
    from larp_jax.weights.networks import identify, load_i3d, load_lpips

    for option in ("tokenizer", "samples"):
        if getattr(arguments, option):
            raise InputError(f"--{option} is for generators, {arguments.checkpoint} holds a tokenizer; leave it out")
    names = _metric_names(arguments.metrics, evaluators.available(found.recipe, found.params))
    networks = {}
    if "lpips" in names:
        networks["lpips"] = load_lpips(arguments.lpips), identify("lpips", arguments.lpips)
    if "rfvd" in names:
        networks["i3d"] = load_i3d(arguments.i3d), identify("i3d", arguments.i3d)

    tokenizer = api.LoadedTokenizer(found.recipe.model, found.params["tokenizer"], step=found.step)
    clips = _clips(arguments, found, tokenizer.config)
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-arguments.batch_size // mesh.size) * mesh.size
    protocol = {}
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        metrics = evaluators.own_metrics(names, found.recipe, mean_clip=found.mean_clip)
        if "lpips" in names:
            network, identity = networks["lpips"]
            metrics.append(evaluators.LpipsDistance(network, mesh))
            protocol["lpips"] = {"backbone": "VGG16, heads v0.1", **identity}
        if "rfvd" in names:
            covariance = clips.protocol.covariance
            features = fvd.VideoFeatures(*networks["i3d"])
            real = fvd.real_statistics(features, clips, batch_size=batch_size, progress=True)
            metrics.append(evaluators.ReconstructionFvd(features, real, covariance, mesh))
            protocol |= {**features.describe(), "covariance": covariance}
        evaluator = evaluators.ReconstructionEvaluator(
            lambda params: tokenizer.module(params["tokenizer"]),
            clips,
            mesh,
            metrics,
            batch_size=batch_size,
            progress=True,
        )
        params = {name: tree for name, tree in found.params.items() if name in ("tokenizer", "prior")}
        scores, extras = evaluator.run(jax.device_put(params, sharding.param_shardings(params, mesh)))
    if not extras["clips"]:
        raise InputError(f"--data {arguments.data}: none of its clips could be read")
    protocol = {
        **clips.describe(),
        "clips": extras["clips"],
        "codes": "deterministic: the nearest code of each latent",
        "precision": "float32",
        **protocol,
        "fingerprint": tokenizer.fingerprint,
    }
    by_position = {}
    if extras["codes"] is not None:
        by_position["entropy_by_position"] = extras["codes"].position_entropy().tolist()
    _write_scores(arguments, found, scores, protocol, by_position)


def _evaluate_generator(arguments, found):
    from larp_jax.evaluation import fvd
    from larp_jax.evaluation.evaluators import GENERATOR_METRICS
    from larp_jax.inference import generate
    from larp_jax.weights.networks import identify, load_i3d

    if not arguments.tokenizer:
        raise InputError(f"{arguments.checkpoint} holds a generator; add --tokenizer P, the one it was trained with")
    names = _metric_names(arguments.metrics, GENERATOR_METRICS)
    if arguments.samples and "fvd" not in names:
        raise InputError("--samples is for --metrics fvd; leave it out")
    batch_size = arguments.batch_size
    if "fvd" in names:
        i3d = load_i3d(arguments.i3d), identify("i3d", arguments.i3d)
    cond_frames = found.recipe.cond_frames if found.recipe.model.frame_prediction else 0
    generator, tokenizer = load_pair(arguments, found)
    # before anything is computed, because it checks how all of them fit each other
    sampler = generate.Sampler(
        generator,
        tokenizer,
        seed=arguments.seed,
        options=sampling_options(arguments),
        batch_size=batch_size,
        cond_frames=cond_frames,
    )
    clips = _clips(arguments, found, tokenizer.config, cond_frames)
    scores, protocol = {}, clips.describe()
    if "cross_entropy" in names:
        of_codes, described = _next_code_scores(found, generator, tokenizer, clips, batch_size)
        scores |= of_codes
        protocol |= described
    if "fvd" in names:
        classes = None if cond_frames else generate.classes_beside(generator, clips)
        evaluator = fvd.FvdEvaluator(*i3d, clips, batch_size=batch_size, progress=True)
        of_videos, described = evaluator.run(generate.videos_beside(sampler, clips, classes, folder=arguments.samples))
        scores |= of_videos
        protocol |= described | {"sampling": sampler.describe()}
        if cond_frames:
            protocol["given"] = f"the first {cond_frames} frames of each clip"
        else:
            known = generator.class_counts is not None
            protocol["given"] = f"classes, {'as frequent as in training' if known else 'those of the clips'}"
            protocol["class_counts"] = generate.class_counts(classes)
    protocol |= {
        "generator_fingerprint": generator.fingerprint,
        "fingerprint": tokenizer.fingerprint,
        "tokenizer": os.path.relpath(arguments.tokenizer),
        "tokenizer_step": tokenizer.step,
    }
    _write_scores(arguments, found, scores, protocol)


def _next_code_scores(found, generator, tokenizer, clips, batch_size):
    """Scores of a generator for the codes of clips, and their protocol."""
    import dataclasses

    import jax

    from larp_jax.config import MeshConfig
    from larp_jax.evaluation import evaluators
    from larp_jax.inference import generate
    from larp_jax.runtime import sharding
    from larp_jax.training.generator import GeneratorStage

    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-batch_size // mesh.size) * mesh.size
    stage = GeneratorStage(dataclasses.replace(found.recipe, precision="float32"), tokenizer.config)
    trees = {"generator": found.params["generator"]}, {"tokenizer": jax.device_get(tokenizer.params)}
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        params, frozen = (jax.device_put(tree, sharding.param_shardings(tree, mesh)) for tree in trees)
        rows = evaluators.encoded_clips(stage.codes, frozen, clips, mesh, batch_size=batch_size, progress=True)
        if not found.recipe.model.frame_prediction:
            rows["label"] = generate.own_labels(generator, clips, rows["label"])
        scores = evaluators.NextCodeEvaluator(stage.score, rows, mesh, batch_size=batch_size).run(params)
    codes = {"K": found.recipe.model.codebook_size, "N": found.recipe.model.num_tokens}
    return scores, {"clips": len(rows["codes"]), "codes": codes}


def _clips(arguments, found, config, cond_frames: int | None = None):
    """The clips of --data and --protocol for a tokenizer's configuration; of generators, `cond_frames` is given."""
    from larp_jax.data import ClipSpec
    from larp_jax.evaluation.protocols import GENERATION, RECONSTRUCTION, ClipSet

    name, stage = arguments.protocol, found.recipe.stage
    known = RECONSTRUCTION if cond_frames is None else GENERATION | {"held_out": RECONSTRUCTION["held_out"]}
    if name and name not in known:
        raise InputError(f"protocol {name} is for no {stage}; choose from {', '.join(known)}, or leave it out")
    protocol = known.get(name)
    if protocol and protocol.fixed and cond_frames not in (None, protocol.cond_frames):
        kinds = [f"given {n} frames" if n else "given classes" for n in (protocol.cond_frames, cond_frames)]
        raise InputError(f"protocol {name} is for generators that are {kinds[0]}, this one is {kinds[1]}; leave it out")
    return ClipSet(
        arguments.data,
        ClipSpec(frames=config.frames, resolution=config.resolution, flip=False),
        protocol,
        name=name or "",
        max_clips=arguments.max_clips,
        training=arguments.training_data or found.recipe.data.train,
    )


def _write_scores(arguments, found, scores, protocol, more=None):
    """Shows scores and writes them with their protocol, and what else there is."""
    import jax

    print_table({"clips": protocol["clips"], **scores})
    wrong = [name for name, score in scores.items() if not math.isfinite(score)]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: no finite number; the weights of {arguments.checkpoint} are damaged")
    if arguments.output and distributed.is_first():
        protocol = {
            **protocol,
            "definitions": {name: text for name, text in DEFINITIONS.items() if name in scores or name == "clips"},
            "checkpoint": os.path.relpath(found.path),
            "weights": arguments.weights,
            "step": found.step,
            "device": jax.devices()[0].device_kind,
            "versions": {"larp_jax": __version__}
            | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "av")},
        }
        files.write_json(arguments.output, {"metrics": scores, "protocol": protocol, **(more or {})})
        print(f"written to {arguments.output}")


def _is_evaluation(path) -> bool:
    values = files.json_object(path)
    return isinstance(values.get("metrics"), dict) and isinstance(values.get("protocol"), dict)


def _metric_names(asked: Sequence[str] | None, fitting: Sequence[str]) -> list[str]:
    """The metrics to compute, of those that fit the checkpoint."""
    from larp_jax.evaluation.evaluators import GENERATOR_METRICS, METRICS

    if asked is None:
        return [name for name in fitting if name not in ("lpips", "rfvd", "fvd")]
    kinds = {"tokenizer": METRICS, "generator": GENERATOR_METRICS}
    ours, other = kinds if set(fitting) <= set(METRICS) else reversed(kinds)
    unknown = sorted(set(asked) - set(METRICS) - set(GENERATOR_METRICS))
    if unknown:
        raise InputError(f"--metrics {','.join(unknown)} is not known; choose from {', '.join(kinds[ours])}")
    if wrong := [name for name in asked if name in kinds[other]]:
        raise InputError(
            f"--metrics {','.join(wrong)} is for a {other}, this is a {ours}; choose from {', '.join(kinds[ours])}"
        )
    unfit = [name for name in asked if name not in fitting]
    if unfit:
        raise InputError(
            f"--metrics {','.join(unfit)} does not fit this checkpoint (usage needs codes, prior codes and a trained"
            f" prior, ssim frames of at least 11x11); choose from {', '.join(fitting)}"
        )
    return [name for name in fitting if name in asked]


DEFINITIONS = {
    "clips": "T frames each, chosen as `windows` says; the tail of a video that fills no window is left out, a video"
    " shorter than T repeats its last frame; shorter side resized to the resolution (bilinear, antialiased), centre cut"
    " out; no flips",
    "psnr": "dB, over all pixels of a clip at once in [0, 1], output clamped; mean over clips",
    "psnr_mean_clip": "the same for the mean of training clips instead of a reconstruction: what a tokenizer gives "
    "whose codes say nothing",
    "ssim": "Gaussian window 11 wide with sigma 1.5, inside the frame only; mean over positions, colours, frames and"
    " then clips",
    "lpips": "LPIPS v0.1 on VGG16, frame by frame, output clamped and not rounded; mean over frames and then clips",
    "rfvd": "Frechet distance between I3D's logits of the clips and of their reconstructions, clamped and not rounded;"
    " frames resized to 224 (bilinear, not antialiased)",
    "fvd": "Frechet distance between I3D's logits of the clips and of as many sampled videos, clamped and not rounded;"
    " a prediction counts with the frames it was given, as the tokenizer decodes them; frames resized to 224 (bilinear,"
    " not antialiased)",
    "cross_entropy": "nats a code, of the clips' codes (the nearest of each latent) under the generator, each from the"
    " condition and those before it; float32, no dropout",
    "top1": "share of these codes that the generator thinks likeliest",
    "top5": "share of them that are among its likeliest five",
    "usage": "share of the codebook that occurs in these clips",
    "perplexity": "exponential of the entropy of all codes' frequencies",
    "kl_from_uniform": "nats, of all codes' frequencies from uniform ones",
    "position_entropy": "nats, entropy of the codes' frequencies at a token position, mean over positions",
    "prior_cross_entropy": "nats a code, of codes 1 .. N-1 under the prior that was trained with the tokenizer, which"
    " reads the latents before each (one round, no dropout)",
    "prior_top1": "share of codes 1 .. N-1 that this prior thinks likeliest",
    "prior_top5": "share of them that are among its likeliest five",
}


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
        replace=arguments.replace,
        batch_size=arguments.batch_size,
    )
    print_table(result["summary"])
    print(f"written to {arguments.output}")
