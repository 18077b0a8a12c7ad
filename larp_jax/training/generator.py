"""Stage 2: a generator of a frozen tokenizer's codes (LARP, arXiv 2410.21264, section 4.1).

`GeneratorStage` is the jitted step: pure functions of arrays that know nothing of meshes or loops. `GeneratorTask` is
the rest of a run: the data it reads, its evaluation and its metadata. The loop is in `larp_jax.training.train`.
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from larp_jax import api, data
from larp_jax.config import FlowRecipe, GeneratorRecipe, Ladder, TokenizerConfig
from larp_jax.data.codes import CodeSet, has_latents, ladder_of
from larp_jax.data.sources import class_list, labels
from larp_jax.data.video import frame_grid
from larp_jax.errors import InputError
from larp_jax.evaluation.evaluators import NextCodeEvaluator, ScoreEvaluator, encoded_clips
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.models.condition import Condition
from larp_jax.models.flow import Flow
from larp_jax.models.generator import Generator
from larp_jax.models.generator_codes import encode_batch, score_batch, score_sums
from larp_jax.models.next_code import NextCode
from larp_jax.models.pixels import to_uint8
from larp_jax.models.sampling import SamplingOptions, sample_codes
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng, sharding
from larp_jax.state import TrainState
from larp_jax.training import common, optim
from larp_jax.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)

NOISY_CONTEXT = 0.75  # share of the steps with noise in the context (released code of reAR)
SAMPLES_SHOWN = 8  # samples shown in an evaluation
GUIDANCE = 1.25  # classifier-free guidance of these samples (Ho & Salimans 2022, arXiv 2207.12598)


# ------------------------------------------------------------------------------------------------------ the jitted step


class GeneratorStage:
    """A generator, trained on the codes of a frozen tokenizer.

    A batch contains `video`, uint8 or float [B, T, H, W, C], which the tokenizer encodes, or `codes`, [B, N] int32, and
    for frame prediction also `condition`, [B, N] int32, and with a ladder `lengths`, [B, T] int32. `label` [B] int32
    contains the classes (-1: none).

    Args:
      recipe: its model is complete: no size is 0.
      tokenizer: configuration of the tokenizer in `frozen`; None if batches contain codes.
    """

    network: type[Generator] | type[Flow] = Generator

    def __init__(self, recipe: GeneratorRecipe | FlowRecipe, tokenizer: TokenizerConfig | None = None):
        self.recipe, model = recipe, recipe.model
        dtype = common.DTYPES[recipe.precision]
        self._make = lambda rngs: self.network(model, rngs=rngs, remat=recipe.remat, dtype=dtype)
        make = {"generator": self._make}
        if tokenizer is not None:
            make["tokenizer"] = lambda rngs: Tokenizer(tokenizer, rngs=rngs)
        self._abstract = {name: nnx.eval_shape(lambda m=m: m(nnx.Rngs(0))) for name, m in make.items()}
        self.graphdefs = {name: nnx.graphdef(module) for name, module in self._abstract.items()}
        self.optimizer = optim.make_generator_optimizer(recipe.optim, recipe.steps)
        self.learning_rate = optim.learning_rate(recipe.optim, recipe.steps)

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""
        params = {"generator": nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key)), nnx.Param))}
        ema = jax.tree.map(jnp.copy, params) if self.recipe.optim.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), params, {"generator": self.optimizer.init(params)}, ema)

    def frozen_shapes(self) -> dict:
        """Shapes and dtypes of what `train_step` needs as `frozen`."""
        modules = {name: module for name, module in self._abstract.items() if name == "tokenizer"}
        return {name: nnx.to_pure_dict(nnx.state(module, nnx.Param)) for name, module in modules.items()}

    def module(self, name: str, params: dict) -> nnx.Module:
        """The module of that name with its parameters, `params[name]`."""
        return nnx.merge(self.graphdefs[name], params[name])

    def codes(self, batch: dict, frozen: dict) -> dict:
        """The batch with `codes`, and for frame prediction `condition`, instead of its `video`.

        Codes are deterministic and computed in float32 at any precision of the recipe, so they are those of
        `larp-jax tokenize`.
        """
        if "video" not in batch:
            return batch
        return encode_batch(self.module("tokenizer", frozen), batch, cond_frames=self.recipe.given_frames)

    def score(
        self, params: dict, batch: dict, key: jax.Array | None = None, context_noise: jax.Array | None = None
    ) -> NextCode:
        """Scores the generator's predictions of `codes` [B, N] in a batch without `video`; options of `score_batch`."""
        return score_batch(self.module("generator", params), batch, key=key, context_noise=context_noise)

    def sums(self, params: dict, batch: dict) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Sums of these scores without dropout, see `score_sums`."""
        return score_sums(self.recipe.model, self.score(params, batch), batch)

    def gradient(
        self, params: dict, batch: dict, key: jax.Array, frozen: dict, **scheduled: jax.Array
    ) -> tuple[dict, dict]:
        """The gradient of the loss of a batch, and scalars to log.

        The loss is the mean cross-entropy over the tokens of all clips, so each weighs the same. With a ladder that of
        codes and that of lengths are also given apart.

        Args:
          params: `{"generator": ...}`.
          batch: see the class.
          key: turns on dropout.
          frozen: as for `train_step`.
          **scheduled: from `scheduled`.
        """
        tokens = self.mean_tokens(batch)

        def of_part(i, part):
            part = self.codes(part, frozen)

            def objective(params):
                return self.objective(params, part, jax.random.fold_in(key, i), tokens, **scheduled)

            return jax.grad(objective, has_aux=True)(params)

        return common.mean_over_parts(of_part, self.recipe.accumulate, batch)

    def mean_tokens(self, batch: dict) -> jax.Array | int:
        """Mean number of codes of the clips of a whole batch, so that it does not matter in which part a clip is."""
        model = self.recipe.model
        return batch["lengths"].sum(axis=1).mean() if model.ladder else model.num_tokens

    def scheduled(self, step: jax.Array | int) -> dict[str, jax.Array]:
        """Numbers that change over training, by name, for `gradient`; steps count from 1.

        `context_noise`: the largest share of random codes in the context.
        """
        recipe = self.recipe
        if not recipe.context_noise:
            return {}
        return {"context_noise": optim.linear(recipe.context_noise, 0.0, NOISY_CONTEXT * recipe.steps)(step)}

    def objective(
        self, params: dict, batch: dict, key: jax.Array, codes: jax.Array | int, **scheduled: jax.Array
    ) -> tuple[jax.Array, dict]:
        """The loss of part of a batch without `video`, and scalars to log; other arguments as for `gradient`."""
        model, scored = self.recipe.model, self.score(params, batch, key, **scheduled)
        sums = {name: total.mean() for name, (total, _) in score_sums(model, scored, batch).items()}
        loss = sums["cross_entropy"] / codes
        logs = {f"top{n}": sums[f"top{n}"] / codes for n in (1, 5)}
        if model.ladder:
            length = sums["length_cross_entropy"]
            logs |= {"code_loss": loss, "length_loss": length / model.blocks}
            loss = (sums["cross_entropy"] + length) / (codes + model.blocks)
        return loss, {"loss": loss, **logs}

    def sample(
        self, params: dict, condition: Condition, numbers: np.ndarray, key: jax.Array, cfg_scale: float
    ) -> tuple[jax.Array, jax.Array | None]:
        """Samples codes, and with a ladder their numbers, for `decode`."""
        options = SamplingOptions(cfg_scale=cfg_scale)
        plan, generator = options.plan(self.recipe.model.symbols), self.module("generator", params)
        sampled = sample_codes(generator, condition, numbers, key, options.scalars(), plan)
        return sampled.codes, sampled.lengths

    def decode(self, frozen: dict, codes: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """Videos of codes as `sample` and `codes` return them."""
        return self.module("tokenizer", frozen).decode(codes, lengths)

    def train_step(self, state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        """One update.

        Args:
          state: donated by the trainer.
          batch: see the class.
          key: the run's root key; the step's randomness is a function of it and `state.step`.
          frozen: the tokenizer's parameters, `{"tokenizer": ...}`; empty if batches contain codes.

        Returns:
          The next state and float32 scalars by name.
        """
        recipe = self.recipe
        key = jax.random.fold_in(key, state.step)
        scheduled = self.scheduled(state.step + 1)
        grads, logs = self.gradient(state.params, batch, key, frozen, **scheduled)
        logs |= scheduled
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step + 1)
        return common.updated(state, grads, self.optimizer, "generator", recipe.optim.ema_decay), logs


# ---------------------------------------------------------------------------------------- what a run reads and measures


class GeneratorTask:
    """A run of stage 2, as `larp_jax.training.stages.Task` defines it.

    Raises:
      InputError: model, tokenizer and data do not match.
    """

    stage_class: ClassVar[type[GeneratorStage]] = GeneratorStage
    evaluator_class: ClassVar[type[ScoreEvaluator]] = NextCodeEvaluator
    shown: tuple[str, ...] = ("loss", "top1", "top5")
    only_logged = ()

    def __init__(self, recipe: GeneratorRecipe | FlowRecipe, mesh: Mesh):
        self._mesh = mesh
        self._tokenizer, params = _load_tokenizer(recipe)
        self._clip = None
        if self._tokenizer is not None:
            config = self._tokenizer
            self._clip = common.clip_spec(config, recipe.data)
            name = fingerprint(config, params["tokenizer"])
            recipe = _with_fingerprint(recipe, name, f"tokenizer={recipe.tokenizer}")
            quantizer = config.quantizer
            size = quantizer.codebook_size if quantizer.has_codes else quantizer.code_dim
            recipe = _with_sizes(recipe, self.sizes(size, config.num_tokens, config.adaptive), "the tokenizer")
            if recipe.given_frames >= config.frames:
                raise InputError(f"cond_frames={recipe.cond_frames} must be below the clip's {config.frames} frames")
        train = lambda: data.open_source(recipe.data.train, self._clip)  # noqa: E731
        self._train, recipe = self._open(recipe, recipe.data.train, train)
        self._eval, names = None, self._train.label_names
        if spec := recipe.data.eval:
            clips = lambda: ClipSet(spec, self._clip, max_clips=recipe.data.eval_clips)  # noqa: E731
            self._eval, recipe = self._open(recipe, spec, clips)
            theirs = getattr(self._eval, "source", self._eval).label_names
            if theirs != names and recipe.model.has_classes:
                ours, theirs = (", ".join(n) or "none" for n in (names, theirs))
                raise InputError(f"data.train has the classes {ours}, data.eval {theirs}; give data of the same ones")
        self._identity = common.data_identity(self._names())
        self.recipe, self._class_counts = self._with_classes(recipe)
        tokens = self.tokens if isinstance(self._train, CodeSet) else "video"
        self.inputs: tuple[str, ...] = (tokens, "label")
        if isinstance(self._train, CodeSet) and recipe.given_frames:
            self.inputs += ("condition",)
        if self.recipe.model.ladder:
            self.inputs += ("lengths",)
        self.stage = self.stage_class(self.recipe, self._tokenizer)
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
        self.frozen = jax.device_put(params, sharding.param_shardings(params, mesh))
        self._evaluator = self._sample_inputs = None

    def _open(self, recipe: GeneratorRecipe, spec: str, open_clips: Callable) -> tuple[Any, GeneratorRecipe]:
        """A `CodeSet`, or the result of `open_clips`, and the recipe with the sizes of the codes filled in."""
        parsed = data.parse_spec(spec)
        if parsed.kind != "tokens":
            if self._clip is None:
                raise InputError(f"data {spec} needs the tokenizer; give its checkpoint, config.tokenizer=P")
            if recipe.model.ladder:
                raise InputError(
                    f"data {spec}: training does not choose how many codes a clip gets; write them with larp-jax"
                    " tokenize --budget, and give tokens:DIR"
                )
            return open_clips(), recipe
        codes = CodeSet(parsed.name)
        manifest = codes.manifest
        recipe = _with_fingerprint(recipe, manifest["fingerprint"], f"data {spec}")
        if has_latents(manifest) == recipe.model.has_codes:
            found, wanted = ("latents", "codes") if recipe.model.has_codes else ("codes", "latents")
            raise InputError(f"data {spec} holds {found}, and this generator needs {wanted}; give a folder of these")
        size = manifest["K"] if recipe.model.has_codes else manifest["d"]
        recipe = _with_sizes(recipe, self.sizes(size, manifest["N"], ladder_of(manifest)), f"data {spec}")
        wanted = recipe.given_frames
        if wanted not in (0, manifest.get("cond_frames")):
            raise InputError(
                f"data {spec} was not made for cond_frames={wanted}; tokenize again with --cond-frames {wanted}"
            )
        codes.rows  # noqa: B018  (read only after these checks: codes may be large, or damaged)
        return codes, recipe

    @property
    def tokens(self) -> str:
        """The name of the array that clips are encoded to."""
        return "codes"

    def sizes(self, size: int, num_tokens: int, ladder: Ladder | None) -> dict[str, Any]:
        """The settings of the model that codes (of so many) or latents (of so many channels) tell."""
        found: dict[str, Any] = {"codebook_size": size, "num_tokens": num_tokens, "blocks": 1, "ladder": ()}
        return found | ({"blocks": ladder.blocks, "ladder": ladder.rungs} if ladder else {})

    def _with_classes(self, recipe: GeneratorRecipe) -> tuple[GeneratorRecipe, np.ndarray | None]:
        """The recipe with the number of classes, and the number of training videos of each class."""
        names, count = self._train.label_names, recipe.model.num_classes
        if not recipe.model.has_classes:
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
        """Names of the training videos or clips, in order."""
        if isinstance(self._train, CodeSet):
            return (f"{row['source']} {row['start']}" for row in self._train.manifest["rows"])
        return map(self._train.name, range(len(self._train)))

    def after_step(self, state, step, placement, key):
        """The state unchanged."""
        return state

    def open_evaluation(self, workdir):
        """Reads or computes the codes of the evaluation clips, and prepares the samples to show."""
        recipe, rows = self.recipe, None
        if isinstance(self._eval, CodeSet):
            rows = self.rows(self._eval.some(recipe.data.eval_clips))
        elif self._eval is not None:
            rows = encoded_clips(
                self.stage.codes, self.frozen, self._eval, self._mesh, batch_size=recipe.data.batch_size
            )
        if rows is not None:
            if self._class_counts is not None and not recipe.model.class_dropout and rows["label"].min() < 0:
                raise InputError("data.eval has videos without a class, which need model.class_dropout above 0")
            batch_size = recipe.data.batch_size
            self._evaluator = self.evaluator_class(self.stage.sums, rows, self._mesh, batch_size=batch_size)
        if self._tokenizer is not None:
            self._prepare_samples(rows)

    def rows(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of a `CodeSet` as the evaluator needs them."""
        return rows

    def batches(self, start_step):
        """This process's rows of the batches of clips or codes from a step on."""
        recipe = self.recipe
        if not isinstance(self._train, CodeSet):
            return common.train_clips(recipe, self._clip, start_step)
        return self._train.batches(
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def watch(self, step, logs):
        """Nothing to warn of."""

    def evaluate(self, state, step, writer):
        """Writes the scores of the evaluation codes and the videos of some samples; returns the scores."""
        params, scores = state.ema or state.params, {}
        if self._evaluator is not None:
            scores = self._evaluator.run(params)
            common.write_scores(scores, step, writer)
        if self._sample_inputs is not None:
            # [original and sample, or sample only; SAMPLES_SHOWN, T, H, W, 3]
            videos = to_uint8(np.stack(self._sample(params, self.frozen, **self._sample_inputs)))[:, :SAMPLES_SHOWN]
            writer.write_image(step, "samples", frame_grid(list(np.concatenate(list(videos.swapaxes(0, 1))))))
            columns = [np.concatenate(list(column), axis=1) for column in videos.swapaxes(0, 1)]
            writer.write_video(step, "samples", np.concatenate(columns, axis=2), fps=8)
        return scores

    def _prepare_samples(self, rows: Mapping[str, np.ndarray] | None) -> None:
        """Prepares the samples to show: of the trained classes in turn, or of the first evaluation clips."""
        model, parts = self.recipe.model, sharding.batch_parts(self._mesh)
        numbers = np.arange(-(-SAMPLES_SHOWN // parts) * parts)
        if model.has_frames:
            if rows is None:
                return
            inputs = {name: rows[name][numbers % len(rows[name])] for name in ("label", "condition", self.tokens)}
        else:
            counts = np.zeros(0) if self._class_counts is None else self._class_counts
            trained = np.flatnonzero(counts) if counts.any() else np.array([-1])
            inputs = {"label": trained[numbers % len(trained)].astype(np.int32)}
        scale, stage = GUIDANCE if model.has_null_class else 1.0, self.stage

        def sample(params, frozen, **given):
            condition, key = Condition.of_batch(model, given), rng.key(self.recipe.seed)
            originals = [stage.decode(frozen, given[self.tokens])] if self.tokens in given else []
            return [*originals, stage.decode(frozen, *stage.sample(params, condition, numbers, key, scale))]

        self._sample = jax.jit(sample, out_shardings=sharding.replicated(self._mesh))
        self._sample_inputs = jax.device_put(inputs, sharding.batch_sharding(self._mesh))

    def metadata(self):
        """The tokenizer's fingerprint, the identity of the training data, and its classes."""
        found = {"tokenizer_fingerprint": self.recipe.tokenizer_fingerprint, "data": self._identity}
        if self._class_counts is not None:
            found["class_counts"] = self._class_counts.tolist()
            found["class_names"] = list(self._train.label_names)
            if self.recipe.model.ladder:
                found["class_codes"] = self._train.mean_codes(self.recipe.model.num_classes)
        return found

    def resume(self, metadata):
        """Checks that the classes are those of the checkpoint; warns if the training data has changed."""
        common.warn_if_data_changed(metadata, self._identity)
        ours, theirs = list(self._train.label_names), metadata.get("class_names")
        if self._class_counts is not None and theirs not in (None, ours):
            changed = next(pair for pair in itertools.zip_longest(theirs, ours) if pair[0] != pair[1])
            raise InputError(
                f"data.train has other classes than before, {changed[1]!r} in place of {changed[0]!r}; give those,"
                " or another --workdir"
            )


def _load_tokenizer(recipe: GeneratorRecipe | FlowRecipe) -> tuple[TokenizerConfig | None, dict]:
    """Configuration and parameters (`{"tokenizer": ...}`) of the recipe's tokenizer; (None, {}) if it has none."""
    if not recipe.tokenizer:
        return None, {}
    try:
        found = api.load_checkpoint(os.path.expanduser(recipe.tokenizer))
    except InputError as error:
        raise InputError(f"tokenizer={recipe.tokenizer}: {error}") from error
    if found.recipe.model.quantizer.has_codes != recipe.model.has_codes:
        kinds = "codes and no continuous latents", "continuous latents and no codes"
        raise InputError(f"tokenizer={recipe.tokenizer} has {kinds[recipe.model.has_codes]}; give another")
    return found.recipe.model, {"tokenizer": found.params["tokenizer"]}


def _with_fingerprint(recipe: GeneratorRecipe, name: str, where: str) -> GeneratorRecipe:
    """The recipe with the fingerprint of its tokenizer filled in; `InputError` if it has another."""
    wanted = recipe.tokenizer_fingerprint
    if wanted not in ("", name):
        raise InputError(f"{where} is of tokenizer {name}, not of {wanted}; give what is of one tokenizer")
    return dataclasses.replace(recipe, tokenizer_fingerprint=name)


def _with_sizes(recipe: Any, found: Mapping[str, Any], where: str) -> Any:
    """The recipe with these sizes filled in; `InputError` if it has other sizes."""
    unset = {"blocks": 1, "ladder": ()}
    for name, value in found.items():
        wanted, default = getattr(recipe.model, name), unset.get(name, 0)
        if wanted not in (default, value):
            raise InputError(f"model.{name}={wanted}, but {where} has {value}; set it to {value}, or to {default}")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **found))
