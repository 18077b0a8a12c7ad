"""Evaluation of a checkpoint on a data set, from Python: the same as `larp-jax evaluate`."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from larp_jax import api, files
from larp_jax.api import LoadedFlow
from larp_jax.config import MeshConfig, TokenizerConfig
from larp_jax.data import ClipSpec
from larp_jax.errors import InputError
from larp_jax.evaluation import fvd, registry
from larp_jax.evaluation.evaluators import FlowEvaluator, NextCodeEvaluator, ReconstructionEvaluator, encoded_clips
from larp_jax.evaluation.generated import classes_for, own_labels, videos_for
from larp_jax.evaluation.metrics import Setting
from larp_jax.evaluation.protocols import GENERATION, RECONSTRUCTION, ClipSet
from larp_jax.inference.generate import Sampler, class_counts, load_pair
from larp_jax.models.flow import flow_sums
from larp_jax.models.generator_codes import encode_batch, score_batch, score_sums
from larp_jax.models.sampling import SamplingOptions
from larp_jax.runtime import rng, sharding
from larp_jax.version import __version__
from larp_jax.weights import networks
from larp_jax.weights.checkpoint import Checkpoint

CLIPS = (
    "T frames each, chosen as described under `windows`; leftover frames at the end of a video are dropped, a video"
    " shorter than T repeats its last frame; resized to just cover the resolution (bilinear, antialiased), then"
    " center crop; no flips"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `evaluate`."""

    checkpoint: str | os.PathLike
    data: str
    metrics: Sequence[str] | None
    budget: str | None
    router: str | os.PathLike | None
    tokenizer: str | os.PathLike | None
    protocol: str | None
    training_data: str | None
    max_clips: int
    weights: str
    lpips: str | os.PathLike | None
    i3d: str | os.PathLike | None
    samples: str | os.PathLike | None
    seed: int
    options: SamplingOptions
    precision: str
    batch_size: int
    progress: bool

    def load_network(self, kind: str) -> tuple[Any, dict[str, Any]]:
        """A trained network and the identity of its files."""
        path = {"lpips": self.lpips, "i3d": self.i3d}[kind]
        network: Any = networks.load_lpips(path) if kind == "lpips" else networks.load_i3d(path)
        return network, networks.identify(kind, path)


def evaluate(
    checkpoint: str | os.PathLike,
    data: str,
    *,
    metrics: Sequence[str] | None = None,
    budget: str | None = None,
    router: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    protocol: str | None = None,
    training_data: str | None = None,
    max_clips: int = 0,
    weights: str = "ema",
    lpips: str | os.PathLike | None = None,
    i3d: str | os.PathLike | None = None,
    samples: str | os.PathLike | None = None,
    seed: int = 0,
    options: SamplingOptions | None = None,
    precision: str = "float32",
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluates a tokenizer or a generator on the clips of a data set.

    docs/evaluation.md defines the metrics and protocols. With several processes, all of them call this function and
    get the same result.

    Args:
      checkpoint: as for `larp_jax.load_tokenizer`, of a tokenizer or a generator.
      data: data set specification, such as `folder:videos/test`.
      metrics: names; by default all that apply to the checkpoint and need no additional network.
      budget: how many codes clips have, as for `larp_jax.api.LoadedTokenizer.assign`; for tokenizers with a ladder.
      router: checkpoint of the router that chooses with the budget `auto`.
      tokenizer: for a generator, the checkpoint of the tokenizer that it was trained with.
      protocol: name of a protocol that chooses the clips; by default all windows of the split `test`.
      training_data: for the protocol `held_out`, the data set whose videos are excluded; by default that of the
        checkpoint.
      max_clips: at most this many clips; 0 for all.
      weights: `ema` for the EMA weights if there are any, or `raw`.
      lpips: weights for `lpips`, from `larp-jax import --kind lpips`; by default where `larp-jax doctor` looks.
      i3d: weights for `rfvd` and `fvd`, from `larp-jax import --kind i3d`; by default where `larp-jax doctor` looks.
      samples: for `fvd`, a folder to keep the sampled codes in; codes already in it are not sampled again.
      seed: for `fvd`, seed of the samples.
      options: for `fvd`, options of the samples; by default those of `SamplingOptions()`.
      precision: for `fvd`, the precision of sampling: `float32` or `bfloat16`.
      batch_size: clips at a time, over all processes.
      progress: whether to show progress bars.

    Returns:
      JSON values, as `larp-jax evaluate --output` writes them: `metrics` (scalars by name), `protocol` (how they were
      computed) and, if codes were counted, `entropy_by_position`. A scalar is NaN or infinite if the weights are.

    Raises:
      InputError: the checkpoint or the data cannot be read, or the arguments do not match them.
    """
    if training_data and protocol != "held_out":
        raise InputError("--training-data is for --protocol held_out; leave it out")
    request = _Request(
        checkpoint=checkpoint, data=data, metrics=metrics, budget=budget, router=router, tokenizer=tokenizer,
        protocol=protocol, training_data=training_data, max_clips=max_clips, weights=weights, lpips=lpips, i3d=i3d,
        samples=samples, seed=seed, options=options or SamplingOptions(), precision=precision, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    found = api.load_checkpoint(checkpoint, weights=weights, kind=None)
    stages = {"tokenizer": _evaluate_tokenizer, "generator": _evaluate_generator}
    if found.recipe.holds not in stages:
        raise InputError(f"{checkpoint} holds a {found.recipe.stage}; give its tokenizer, with --budget auto")
    scores, described, more = stages[found.recipe.holds](request, found)
    definitions = {"clips": CLIPS} | registry.definitions()
    described |= {
        "definitions": {name: text for name, text in definitions.items() if name in scores or name == "clips"},
        "checkpoint": files.relative(found.path),
        "weights": weights,
        "step": found.step,
        "device": jax.devices()[0].device_kind,
        "versions": {"larp_jax": __version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "av")},
    }
    return {"metrics": scores, "protocol": described, **more}


def _evaluate_tokenizer(request: _Request, found: Checkpoint) -> tuple[dict[str, float], dict[str, Any], dict]:
    """Scores, protocol, and further entries of the result."""
    for option in ("tokenizer", "samples"):
        if getattr(request, option):
            raise InputError(f"--{option} is for generators, {request.checkpoint} holds a tokenizer; leave it out")
    names = registry.choose(request.metrics, registry.available(found.recipe, found.params), "tokenizer")
    names.sort(key=lambda name: registry.METRICS[name].network != "")  # metrics without a network come first
    networks = {name: request.load_network(kind) for name in names if (kind := registry.METRICS[name].network)}
    router = None if request.router is None else api.load_router(request.router, weights=request.weights)
    model = found.recipe.model
    tokenizer = api.LoadedTokenizer(model, found.params["tokenizer"], step=found.step, router=router)
    assign = tokenizer.assigner(request.budget)
    clips = _clips(request, found, tokenizer.config)
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-request.batch_size // mesh.size) * mesh.size
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        setting = Setting(
            recipe=found.recipe,
            mean_clip=found.mean_clip,
            clips=clips,
            mesh=mesh,
            batch_size=batch_size,
            progress=request.progress,
        )
        metrics = []
        for name in names:
            network, identity = networks.get(name, (None, None))
            own = dataclasses.replace(setting, network=network, identity=identity)
            metrics.append(registry.METRICS[name].create(own))
        evaluator = ReconstructionEvaluator(
            lambda params: tokenizer.module(params["tokenizer"]),
            clips,
            mesh,
            metrics,
            batch_size=batch_size,
            lengths=assign,
            progress=request.progress,
        )
        params = {name: tree for name, tree in found.params.items() if name in ("tokenizer", "prior")} | assign.params
        scores, extras = evaluator.run(jax.device_put(params, sharding.param_shardings(params, mesh)))
    if not extras["clips"]:
        raise InputError(f"--data {request.data}: none of its clips could be read; see the log for the reasons")
    described = clips.describe() | {
        "clips": extras["clips"],
        **_deterministic(model),
        "precision": "float32",
    }
    for metric in metrics:
        described |= metric.describe()
    described["fingerprint"] = tokenizer.fingerprint
    if tokenizer.config.adaptive:
        described["budget"] = request.budget or "the most codes in equal blocks"
    codes = extras["codes"]
    return scores, described, {} if codes is None else {"entropy_by_position": codes.position_entropy().tolist()}


def _deterministic(model: TokenizerConfig) -> dict[str, Any]:
    """How clips are encoded, for the protocol."""
    if model.quantizer.has_codes:
        return {"codes": "deterministic: the nearest code of each latent"}
    return {"latents": "deterministic: the means", **model.size_of_clip}


def _evaluate_generator(request: _Request, found: Checkpoint) -> tuple[dict[str, float], dict[str, Any], dict]:
    """Scores, protocol, and further entries of the result."""
    if not request.tokenizer:
        raise InputError(f"{request.checkpoint} holds a generator; add --tokenizer P, the one it was trained with")
    if request.budget or request.router:
        raise InputError(f"--budget is for tokenizers, {request.checkpoint} holds a generator; leave it out")
    names = registry.choose(request.metrics, registry.generator_metrics(found.recipe.model), "generator")
    if found.recipe.model.ladder and "cross_entropy" in names:
        raise InputError(
            f"{request.checkpoint} has a ladder: its cross_entropy depends on how many codes clips are given, and is"
            " measured in training, with data.eval=tokens:DIR; choose --metrics fvd"
        )
    if request.samples and "fvd" not in names:
        raise InputError("--samples is for --metrics fvd; leave it out")
    i3d = request.load_network("i3d") if "fvd" in names else None
    cond_frames = found.recipe.given_frames
    generator, tokenizer = load_pair(found, request.tokenizer, weights=request.weights, precision=request.precision)
    # created first, because it checks that generator, tokenizer and options match
    sampler = Sampler(
        generator,
        tokenizer,
        seed=request.seed,
        options=request.options,
        batch_size=request.batch_size,
        cond_frames=cond_frames,
    )
    clips = _clips(request, found, tokenizer.config, cond_frames)
    scores: dict[str, float] = {}
    described = clips.describe()
    if set(names) - {"fvd"}:
        own_scores, own_protocol = _own_scores(request, found, generator, tokenizer, clips)
        scores |= own_scores
        described |= own_protocol
    if i3d:
        classes = classes_for(generator, clips)
        evaluator = fvd.FvdEvaluator(*i3d, clips, batch_size=request.batch_size, progress=request.progress)
        codes: dict[str, Any] = {}
        videos = videos_for(sampler, clips, classes, folder=request.samples, described=codes)
        video_scores, video_protocol = evaluator.run(videos)
        scores |= video_scores
        described |= video_protocol | {"sampling": sampler.describe()} | codes
        given = [f"the first {cond_frames} frames of each clip"] if cond_frames else []
        if classes is not None:
            as_trained = generator.class_counts is not None and not cond_frames
            given.append(f"classes, {'as frequent as in training' if as_trained else 'those of the clips'}")
            described["class_counts"] = class_counts(classes)
        described["given"] = " and ".join(given) or "nothing"
    described |= {
        "generator_fingerprint": generator.fingerprint,
        "fingerprint": tokenizer.fingerprint,
        "tokenizer": files.relative(request.tokenizer),
        "tokenizer_step": tokenizer.step,
    }
    return scores, described, {}


def _own_scores(
    request: _Request,
    found: Checkpoint,
    generator: api.LoadedGenerator,
    tokenizer: api.LoadedTokenizer,
    clips: ClipSet,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores of a generator on the codes or latents of clips, in float32, and their protocol."""
    config = found.recipe.model
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = -(-request.batch_size // mesh.size) * mesh.size
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: generator.network(config, rngs=nnx.Rngs(0))))
    cond_frames = found.recipe.given_frames

    def codes(batch, params):
        return encode_batch(tokenizer.module(params), batch, cond_frames=cond_frames)

    def sums(params, batch):
        network = nnx.merge(graphdef, params)
        if config.has_codes:
            return score_sums(config, score_batch(network, batch), batch)
        return flow_sums(network, batch, rng.key(0))

    trees = found.params["generator"], jax.device_get(tokenizer.params)
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
        params, frozen = (jax.device_put(tree, sharding.param_shardings(tree, mesh)) for tree in trees)
        rows = encoded_clips(codes, frozen, clips, mesh, batch_size=batch_size, progress=request.progress)
        if config.has_classes:
            rows["label"] = own_labels(generator, clips, rows["label"])
        if isinstance(generator, LoadedFlow):
            given = [name for name in ("latents", "condition") if name in rows]
            rows |= {name: np.asarray(generator.standardized(rows[name])) for name in given}
        evaluator = NextCodeEvaluator if config.has_codes else FlowEvaluator
        scores = evaluator(sums, rows, mesh, batch_size=batch_size).run(params)
    size = {"K": config.codebook_size} if config.has_codes else {"d": config.code_dim}
    return scores, {"clips": len(rows["label"]), tokenizer.config.quantizer.tokens: size | {"N": config.num_tokens}}


def _clips(request: _Request, found: Checkpoint, config: TokenizerConfig, cond_frames: int | None = None) -> ClipSet:
    """The clips of data and protocol for a tokenizer's configuration; for generators, `cond_frames` is given."""
    name, stage = request.protocol, found.recipe.stage
    known = RECONSTRUCTION if cond_frames is None else GENERATION | {"held_out": RECONSTRUCTION["held_out"]}
    if name and name not in known:
        names = ", ".join(known)
        raise InputError(f"protocol {name} does not apply to a {stage}; choose from {names}, or leave it out")
    protocol = known[name] if name else None
    if protocol and protocol.fixed and cond_frames not in (None, protocol.cond_frames):
        kinds = [f"given {n} frames" if n else "given classes" for n in (protocol.cond_frames, cond_frames)]
        raise InputError(f"protocol {name} is for generators {kinds[0]}, this one is {kinds[1]}; leave it out")
    sampled = found.recipe.data
    return ClipSet(
        request.data,
        ClipSpec.of(config.clip_shape, flip=False, fps=sampled.fps, stride=sampled.stride),
        protocol,
        name=name or "",
        max_clips=request.max_clips,
        training=request.training_data or found.recipe.data.train,
    )
