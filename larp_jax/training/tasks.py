"""What a run of each stage reads, measures and shows: all that the trainer leaves to the stage but its jitted step."""

import dataclasses
import hashlib
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from larp_jax import api, data
from larp_jax.config import GeneratorRecipe, TokenizerConfig, TokenizerRecipe
from larp_jax.data.sources import class_list, labels
from larp_jax.data.video import frame_grid
from larp_jax.errors import InputError
from larp_jax.evaluation.evaluators import NextCodeEvaluator, ReconstructionEvaluator, encoded_clips
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.evaluation.registry import available, default_metrics
from larp_jax.inference.code_sets import CodeSet
from larp_jax.models.pixels import to_uint8
from larp_jax.models.sampling import SamplingOptions, sample_codes
from larp_jax.runtime import rng, sharding
from larp_jax.state import TrainState
from larp_jax.training.steps import GeneratorStage, TokenizerStage
from larp_jax.training.writers import MetricWriter
from larp_jax.weights import checkpoint
from larp_jax.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)

MEAN_CLIP_CLIPS = 256
PICTURED = 8  # samples
GUIDANCE = 1.25  # of these, METHOD 4


class Task(Protocol):
    """A stage as the trainer sees it. Making it opens the data and writes nothing.

    Attributes:
      recipe: complete: with what only the data or another checkpoint tells.
      stage: of `larp_jax.training.steps`: `init` and `train_step`.
      frozen: what `train_step` reads and never changes, on the mesh.
      inputs: names of the arrays of a batch that `train_step` takes.
      shown: names of the logs that the progress bar shows.
      only_logged: names of the logs that are computed in logged steps only.
    """

    recipe: Any
    stage: Any
    frozen: dict
    inputs: tuple[str, ...]
    shown: tuple[str, ...]
    only_logged: tuple[str, ...]

    def start(self, state: TrainState, placement: TrainState, key: jax.Array) -> TrainState:
        """The state before the first step, given that of `stage.init`, which may be donated."""

    def open_evaluation(self, workdir: pathlib.Path) -> None:
        """Prepares for `evaluate`, once the workdir is this run's."""

    def batches(self, start_step: int) -> data.Batches:
        """This process's rows of the batches from a step on."""

    def watch(self, step: int, logs: Mapping[str, float]) -> None:
        """Warns of what does not look right in a logged step."""

    def evaluate(self, state: TrainState, step: int, writer: MetricWriter) -> dict[str, float]:
        """Writes an evaluation's scalars and pictures; returns the scalars."""

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says about the run beside its recipe, ready for JSON."""

    def resume(self, metadata: Mapping[str, Any]) -> None:
        """Takes up what `metadata` gave when the checkpoint was saved that the run continues from."""


class TokenizerTask:
    """Training a tokenizer; see `Task`."""

    inputs = ("video",)
    shown = ("loss", "loss_reconstruction", "loss_prior", "loss_adversarial", "psnr", "perplexity")
    only_logged = ("ssim",)

    def __init__(self, recipe: TokenizerRecipe, mesh: Mesh):
        self.recipe, self._mesh = recipe, mesh
        self.stage = TokenizerStage(recipe)
        self.frozen = jax.device_put(self.stage.frozen(), sharding.replicated(mesh))
        model = recipe.model
        self._clip = data.ClipSpec(frames=model.frames, resolution=model.resolution, flip=recipe.data.flip)
        source = data.open_source(recipe.data.train, self._clip)
        self._identity = _identity(map(source.name, range(len(source))))
        self._evaluator = self._code_counts = None

    def start(self, state, placement, key):
        """See `Task`."""
        count = self.recipe.data_init_clips
        if not count:
            return state
        clips = jax.device_put(self._some_clips(count), sharding.replicated(self._mesh))
        return jax.jit(self.stage.data_init, donate_argnums=0, out_shardings=placement)(state, clips, key)

    def open_evaluation(self, workdir):
        """See `Task`."""
        recipe = self.recipe
        if not recipe.data.eval:
            return
        path = workdir / checkpoint.MEAN_CLIP
        if path.exists():
            mean_clip = checkpoint.read_mean_clip(path, recipe.model.clip_shape)
        else:
            # what a tokenizer whose codes say nothing gives at best
            mean_clip = self._some_clips(MEAN_CLIP_CLIPS).mean(axis=0) / 255.0
            if jax.process_index() == 0:
                checkpoint.write_mean_clip(workdir, mean_clip)
        self._evaluator = ReconstructionEvaluator(
            lambda params: self.stage.module("tokenizer", params),
            ClipSet(recipe.data.eval, self._clip, max_clips=recipe.data.eval_clips),
            self._mesh,
            default_metrics(available(recipe, self.stage.graphdefs), recipe, mean_clip=mean_clip),
            batch_size=recipe.data.batch_size,
        )

    def batches(self, start_step):
        """See `Task`."""
        return _train_clips(self.recipe, self._clip, start_step)

    def watch(self, step, logs):
        """See `Task`."""
        if logs.get("perplexity", math.inf) < 2.0 and step >= 10 * self.recipe.log_every:
            logger.warning(
                "step %d: codes have collapsed to perplexity %.2f; see the README on small runs",
                step,
                logs["perplexity"],
            )

    def evaluate(self, state, step, writer):
        """See `Task`."""
        if self._evaluator is None:
            return {}
        scores, extras = self._evaluator.run(state.ema or state.params)
        self._code_counts = None if extras["codes"] is None else extras["codes"].counts.sum(axis=0)
        _write_scores(scores, step, writer)
        if scores["psnr"] < scores["psnr_mean_clip"] + 0.1 and step > self.recipe.steps // 10:
            logger.warning(
                "step %d: reconstructions are no better than the mean training clip (%.2f dB)",
                step,
                scores["psnr_mean_clip"],
            )
        if len(extras["examples"]):
            rows = [video for pair in extras["examples"] for video in pair]
            writer.write_image(step, "reconstruction", frame_grid(rows))
            side_by_side = np.concatenate([np.concatenate(list(pair), axis=2) for pair in extras["examples"]], axis=1)
            writer.write_video(step, "reconstruction", side_by_side, fps=8)
        return scores

    def metadata(self):
        """See `Task`."""
        counts = {} if self._code_counts is None else {"code_counts": self._code_counts.tolist()}
        return {"data": self._identity} | counts

    def resume(self, metadata):
        """See `Task`."""
        _compare_data(metadata, self._identity)
        if (counts := metadata.get("code_counts")) is not None:
            self._code_counts = np.asarray(counts, np.int64)

    def _some_clips(self, count: int) -> np.ndarray:
        """Training clips, uint8 [count, T, H, W, 3], the same on every process and in every run of this seed."""
        videos = []
        with data.train_batches(self.recipe.data.train, self._clip, batch_size=16, seed=self.recipe.seed) as batches:
            while len(videos) * 16 < count:
                videos.append(next(batches)["video"])
        return np.concatenate(videos)[:count]


class GeneratorTask:
    """Training a generator on a frozen tokenizer's codes; see `Task`.

    Raises:
      InputError: model, tokenizer and data do not fit each other.
    """

    shown = ("loss", "top1", "top5")
    only_logged = ()

    def __init__(self, recipe: GeneratorRecipe, mesh: Mesh):
        self._mesh = mesh
        self._tokenizer, params = _load_tokenizer(recipe)
        self._clip = None
        if self._tokenizer is not None:
            config = self._tokenizer
            self._clip = data.ClipSpec(frames=config.frames, resolution=config.resolution, flip=recipe.data.flip)
            name = fingerprint(config, params["tokenizer"])
            recipe = _with_fingerprint(recipe, name, f"tokenizer={recipe.tokenizer}")
            recipe = _with_sizes(recipe, config.quantizer.codebook_size, config.num_tokens, "the tokenizer")
            if recipe.model.frame_prediction and recipe.cond_frames >= config.frames:
                raise InputError(f"cond_frames={recipe.cond_frames} must be below the clip's {config.frames} frames")
        train = lambda: data.open_source(recipe.data.train, self._clip)  # noqa: E731
        self._train, recipe = self._open(recipe, recipe.data.train, train)
        self._eval, names = None, self._train.label_names
        if spec := recipe.data.eval:
            clips = lambda: ClipSet(spec, self._clip, max_clips=recipe.data.eval_clips)  # noqa: E731
            self._eval, recipe = self._open(recipe, spec, clips)
            theirs = getattr(self._eval, "source", self._eval).label_names
            if theirs != names and not recipe.model.frame_prediction:
                ours, theirs = (", ".join(n) or "none" for n in (names, theirs))
                raise InputError(f"data.train has the classes {ours}, data.eval {theirs}; give data of the same ones")
        self._identity = _identity(self._names())
        self.recipe, self._class_counts = self._with_classes(recipe)
        self.inputs = ("codes", "label") if isinstance(self._train, CodeSet) else ("video", "label")
        if isinstance(self._train, CodeSet) and recipe.model.frame_prediction:
            self.inputs += ("condition",)
        self.stage = GeneratorStage(self.recipe, self._tokenizer)
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
        self.frozen = jax.device_put(params, sharding.param_shardings(params, mesh))
        self._evaluator = self._pictured = None

    def _open(self, recipe: GeneratorRecipe, spec: str, open_clips: Callable) -> tuple[Any, GeneratorRecipe]:
        """A `CodeSet` or what `open_clips` gives, and the recipe with what it tells."""
        parsed = data.parse_spec(spec)
        if parsed.kind != "tokens":
            if self._clip is None:
                raise InputError(f"data {spec} needs the tokenizer; give its checkpoint, config.tokenizer=P")
            return open_clips(), recipe
        codes = CodeSet(parsed.name)
        manifest = codes.manifest
        recipe = _with_fingerprint(recipe, manifest["fingerprint"], f"data {spec}")
        recipe = _with_sizes(recipe, manifest["K"], manifest["N"], f"data {spec}")
        wanted = recipe.cond_frames if recipe.model.frame_prediction else None
        if wanted not in (None, manifest.get("cond_frames")):
            raise InputError(
                f"data {spec} was not made for cond_frames={wanted}; tokenize again with --cond-frames {wanted}"
            )
        codes.rows  # noqa: B018  (reads them now that they are known to fit: they may be large, or damaged)
        return codes, recipe

    def _with_classes(self, recipe: GeneratorRecipe) -> tuple[GeneratorRecipe, np.ndarray | None]:
        """The recipe with the number of classes, and how many training videos each has."""
        names, count = self._train.label_names, recipe.model.num_classes
        if recipe.model.frame_prediction:
            count = count or len(names) or 1
            return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_classes=count)), None
        found = self._train.labels() if isinstance(self._train, CodeSet) else labels(self._train)
        needed = max(len(names), int(found.max()) + 1)
        if needed > (count or needed):
            raise InputError(
                f"data.train has label {needed - 1}, but model.num_classes={count}; raise it, or set it to 0"
            )
        count = count or needed or 1
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_classes=count))
        if found.min() < 0 and not recipe.model.class_dropout:
            raise InputError("data.train has videos without a class, which need model.class_dropout above 0")
        counts = np.bincount(found[found >= 0], minlength=count)
        if counts.any() and not counts.all():
            empty = np.flatnonzero(counts == 0).tolist()
            logger.warning("data.train has no video of the classes %s: they are not learned", class_list(empty, names))
        return recipe, counts

    def _names(self) -> Iterable[str]:
        """What the training data is made of, in its order."""
        if isinstance(self._train, CodeSet):
            return (f"{row['source']} {row['start']}" for row in self._train.manifest["rows"])
        return map(self._train.name, range(len(self._train)))

    def start(self, state, placement, key):
        """See `Task`."""
        return state

    def open_evaluation(self, workdir):
        """See `Task`."""
        recipe, rows = self.recipe, None
        if isinstance(self._eval, CodeSet):
            rows = self._eval.some(recipe.data.eval_clips)
        elif self._eval is not None:
            rows = encoded_clips(
                self.stage.codes, self.frozen, self._eval, self._mesh, batch_size=recipe.data.batch_size
            )
        if rows is not None:
            if self._class_counts is not None and not recipe.model.class_dropout and rows["label"].min() < 0:
                raise InputError("data.eval has videos without a class, which need model.class_dropout above 0")
            self._evaluator = NextCodeEvaluator(self.stage.score, rows, self._mesh, batch_size=recipe.data.batch_size)
        if self._tokenizer is not None:
            self._make_pictures(rows)

    def batches(self, start_step):
        """See `Task`."""
        recipe = self.recipe
        if not isinstance(self._train, CodeSet):
            return _train_clips(recipe, self._clip, start_step)
        return self._train.batches(
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def watch(self, step, logs):
        """See `Task`."""

    def evaluate(self, state, step, writer):
        """See `Task`."""
        params, scores = state.ema or state.params, {}
        if self._evaluator is not None:
            scores = self._evaluator.run(params)
            _write_scores(scores, step, writer)
        if self._pictured is not None:
            # [what is beside each other, PICTURED, T, H, W, 3]
            videos = to_uint8(np.stack(self._draw(params, self.frozen, **self._pictured)))[:, :PICTURED]
            writer.write_image(step, "samples", frame_grid(list(np.concatenate(list(videos.swapaxes(0, 1))))))
            columns = [np.concatenate(list(column), axis=1) for column in videos.swapaxes(0, 1)]
            writer.write_video(step, "samples", np.concatenate(columns, axis=2), fps=8)
        return scores

    def _make_pictures(self, rows: Mapping[str, np.ndarray] | None) -> None:
        """Prepares for pictures of samples: of the trained classes in turn, or of the first evaluation clips."""
        model, parts = self.recipe.model, sharding.batch_parts(self._mesh)
        numbers = np.arange(-(-PICTURED // parts) * parts)
        if not model.frame_prediction:
            trained = np.flatnonzero(self._class_counts) if self._class_counts.any() else np.array([-1])
            pictured = {"condition": trained[numbers % len(trained)].astype(np.int32)}
        elif rows is not None:
            pictured = {name: rows[name][numbers % len(rows[name])] for name in ("condition", "codes")}
            separator = ((0, 0), (0, 1))
            pictured["condition"] = np.pad(pictured["condition"], separator, constant_values=model.codebook_size)
        else:
            return
        guided = not model.frame_prediction and model.class_dropout > 0
        options = SamplingOptions(cfg_scale=GUIDANCE if guided else 1.0)

        def draw(params, frozen, condition, codes=None):
            generator, tokenizer = self.stage.module("generator", params), self.stage.module("tokenizer", frozen)
            key, plan = rng.key(self.recipe.seed), options.plan(model.num_tokens)
            drawn = sample_codes(generator, condition, numbers, key, options.scalars(), plan)
            return [tokenizer.decode(x) for x in (codes, drawn) if x is not None]

        self._draw = jax.jit(draw, out_shardings=sharding.replicated(self._mesh))
        self._pictured = jax.device_put(pictured, sharding.batch_sharding(self._mesh))

    def metadata(self):
        """See `Task`."""
        found = {"tokenizer_fingerprint": self.recipe.tokenizer_fingerprint, "data": self._identity}
        if self._class_counts is not None:
            found["class_counts"] = self._class_counts.tolist()
            found["class_names"] = list(self._train.label_names)
        return found

    def resume(self, metadata):
        """See `Task`."""
        _compare_data(metadata, self._identity)
        ours, theirs = list(self._train.label_names), metadata.get("class_names")
        if self._class_counts is not None and theirs not in (None, ours):
            changed = next(pair for pair in itertools.zip_longest(theirs, ours) if pair[0] != pair[1])
            raise InputError(
                f"data.train has other classes than before, {changed[1]!r} in place of {changed[0]!r}; give those,"
                " or another --workdir"
            )


TASKS = {"tokenizer": TokenizerTask, "generator": GeneratorTask}


def _load_tokenizer(recipe: GeneratorRecipe) -> tuple[TokenizerConfig | None, dict]:
    """Configuration and parameters (`{"tokenizer": ...}`) of the recipe's tokenizer; nothing where it names none."""
    if not recipe.tokenizer:
        return None, {}
    try:
        found = api.load_checkpoint(os.path.expanduser(recipe.tokenizer))
    except InputError as error:
        raise InputError(f"tokenizer={recipe.tokenizer}: {error}") from error
    if found.recipe.model.quantizer.kind == "kl":
        raise InputError(f"tokenizer={recipe.tokenizer} has continuous latents and no codes; give another")
    return found.recipe.model, {"tokenizer": found.params["tokenizer"]}


def _with_fingerprint(recipe: GeneratorRecipe, name: str, where: str) -> GeneratorRecipe:
    wanted = recipe.tokenizer_fingerprint
    if wanted not in ("", name):
        raise InputError(f"{where} is of tokenizer {name}, not of {wanted}; give what is of one tokenizer")
    return dataclasses.replace(recipe, tokenizer_fingerprint=name)


def _with_sizes(recipe: GeneratorRecipe, codebook_size: int, num_tokens: int, where: str) -> GeneratorRecipe:
    """The recipe with the sizes of codes filled in; refuses other sizes."""
    found = {"codebook_size": codebook_size, "num_tokens": num_tokens}
    for name, value in found.items():
        wanted = getattr(recipe.model, name)
        if wanted not in (0, value):
            raise InputError(f"model.{name}={wanted}, but {where} has {value}; set it to {value}, or to 0")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **found))


def _identity(names: Iterable[str]) -> dict[str, Any]:
    """How many clips or videos there are and a digest of their names, on which the order depends that they come in."""
    digest, count = hashlib.sha256(), 0
    for count, name in enumerate(names, 1):  # noqa: B007
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return {"count": count, "names": digest.hexdigest()[:16]}


def _compare_data(metadata: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    before = metadata.get("data", identity)
    if before != identity:
        logger.warning(
            "data.train has %d videos, it had %d when the checkpoint was saved, or others: clips come in another order "
            "than in a run that was never stopped",
            identity["count"],
            before["count"],
        )


def _train_clips(recipe: TokenizerRecipe | GeneratorRecipe, clip: data.ClipSpec, start_step: int) -> data.Batches:
    """Training batches of clips from a step on."""
    return data.train_batches(
        recipe.data.train,
        clip,
        batch_size=recipe.data.batch_size,
        seed=recipe.seed,
        start_step=start_step,
        workers=recipe.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _write_scores(scores: Mapping[str, float], step: int, writer: MetricWriter) -> None:
    writer.write_scalars(step, {f"eval/{name}": value for name, value in scores.items()})
    logger.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
