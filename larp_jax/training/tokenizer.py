"""Stage 1: tokenizer, prior and discriminator trained together (LARP, arXiv 2410.21264, sections 3.2 and 3.3).

`TokenizerStage` is the jitted step: pure functions of arrays that know nothing of meshes or loops. `TokenizerTask` is
the rest of a run: the data it reads, its evaluation and its metadata. The discriminator is in
`larp_jax.training.adversarial`, networks that never change in `larp_jax.training.frozen`, and the loop in
`larp_jax.training.train`.
"""

import dataclasses
import difflib
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from larp_jax import data, metrics
from larp_jax.config import AUTO, RANDOM, TokenizerRecipe
from larp_jax.data.video import frame_grid
from larp_jax.errors import InputError
from larp_jax.evaluation.evaluators import ReconstructionEvaluator
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.evaluation.registry import available, default_metrics
from larp_jax.models.alignment import Projector, resampled
from larp_jax.models.anchored_init import anchored_init
from larp_jax.models.packing import layout, repeated
from larp_jax.models.paths import path_name
from larp_jax.models.pixels import as_float_video
from larp_jax.models.prior import Prior
from larp_jax.models.quantizer import Quantized, kmeans_codebook
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import sharding
from larp_jax.state import TrainState
from larp_jax.training import common, corruption, losses, optim
from larp_jax.training.adversarial import Adversary
from larp_jax.training.features import open_features
from larp_jax.training.frozen import Frozen
from larp_jax.weights import checkpoint
from larp_jax.weights.fingerprint import digest, parts

logger = logging.getLogger(__name__)

LENGTHS, VIEW, NOISE = 2, 3, 4  # numbers of random keys; sampling and the prior have the first two
MEAN_CLIP_CLIPS = 256


# ------------------------------------------------------------------------------------------------------ the jitted step


class TokenizerStage:
    """Tokenizer, prior, projector and discriminator, updated together; those of them that the recipe needs."""

    def __init__(self, recipe: TokenizerRecipe):
        self.recipe = recipe
        loss = recipe.loss
        self.networks = Frozen(recipe)
        make = {"tokenizer": self._make_tokenizer}
        if loss.prior_weight:
            make["prior"] = self._make_prior
        self.adversary = None
        if loss.adversarial_weight:
            self.adversary = Adversary(recipe, self.module, self.networks.modules.get("trunk"))
            make["discriminator"] = self.adversary.make
        if loss.alignment_weight:
            make["projector"] = self._make_projector
        self._make = make
        self._abstract = {name: nnx.eval_shape(lambda m=m: m(nnx.Rngs(0))) for name, m in make.items()}
        modules = self._abstract | self.networks.modules
        self.graphdefs = {name: nnx.graphdef(module) for name, module in modules.items()}
        self._check_multipliers()
        self.optimizer = optim.make_optimizer(recipe.optim, recipe.steps)
        self.learning_rate = optim.learning_rate(recipe.optim, recipe.steps)
        quantizer = recipe.model.quantizer
        self.temperature = optim.linear(
            quantizer.temperature_start or quantizer.temperature,
            quantizer.temperature,
            quantizer.temperature_ramp * recipe.steps,
        )
        self.mix_ratio = optim.linear(0.0, recipe.prior.mix_max, recipe.prior.mix_ramp * recipe.steps)
        # a run from other weights has a codebook already
        self.continuous_steps = 0 if recipe.init_from else recipe.start.continuous_steps
        self.share = optim.linear(0.0, 1.0, recipe.start.ramp_steps)

    def _check_multipliers(self) -> None:
        """`InputError` if a multiplier matches no parameter. Multipliers for a prior are allowed without a prior."""
        modules = _model(self._abstract)
        params = {name: nnx.to_pure_dict(nnx.state(module, nnx.Param)) for name, module in modules.items()}
        names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        paths = {name[:end] for name in names for end in [i for i, c in enumerate(name) if c == "/"] + [len(name)]}
        for wanted in self.recipe.optim.multipliers:
            if wanted not in paths and wanted.partition("/")[0] not in {"prior"} - modules.keys():
                near = difflib.get_close_matches(wanted, paths, n=1, cutoff=0.0)[0]
                raise InputError(
                    f"optim.multipliers: {wanted} is not a parameter or a prefix of one; did you mean {near}?"
                )

    def _make_tokenizer(self, rngs: nnx.Rngs) -> Tokenizer:
        r = self.recipe
        tokenizer = Tokenizer(r.model, rngs=rngs, remat=r.remat, dtype=common.DTYPES[r.precision])
        if r.start.anchored and not r.init_from:
            anchored_init(tokenizer)
        return tokenizer

    def _make_prior(self, rngs: nnx.Rngs) -> Prior:
        r = self.recipe
        quantizer = r.model.quantizer
        return Prior(
            r.prior,
            r.model.query_rows,
            quantizer.code_dim,
            blocks=r.model.blocks,
            rngs=rngs,
            remat=r.remat,
            dtype=common.DTYPES[r.precision],
        )

    def _make_projector(self, rngs: nnx.Rngs) -> Projector:
        r, channels = self.recipe, self.networks.modules["teacher"].dim
        return Projector(r.model.decoder.width, channels, rngs=rngs, dtype=common.DTYPES[r.precision])

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""
        params = {
            name: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(jax.random.fold_in(key, i))), nnx.Param))
            for i, (name, make) in enumerate(self._make.items())
        }
        model = _model(params)
        opt_state = {"tokenizer": self.optimizer.init(self.trained(model))}
        if self.adversary is not None:
            opt_state["discriminator"] = self.adversary.init(params["discriminator"])
        ema = jax.tree.map(jnp.copy, model) if self.recipe.optim.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)

    def set_codebook(self, state: TrainState, video: jax.Array, key: jax.Array, frozen: dict) -> TrainState:
        """The state with the k-means of the latents of clips as its codebook.

        Args:
          state: may be donated.
          video: uint8 [parts, B, T, H, W, C]; the parts are encoded one after the other.
          key: random key of the first centers.
          frozen: as returned by `frozen`.
        """
        tokenizer = self.module("tokenizer", state.params)

        def encoded(part):
            i, clips = part
            video = as_float_video(clips)
            quantized = tokenizer.quantize(video, self.lengths(video, jax.random.fold_in(key, i), frozen))
            return quantized.z, quantized.valid

        found = jax.lax.map(encoded, (jnp.arange(len(video)), video))
        latents, valid = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
        codebook = kmeans_codebook(self.recipe.model.quantizer, latents, key, valid)

        def replaced(params):
            quantizer = params["tokenizer"]["quantizer"] | {"embedding": codebook}
            return params | {"tokenizer": params["tokenizer"] | {"quantizer": quantizer}}

        ema = replaced(state.ema) if state.ema else {}
        return dataclasses.replace(state, params=replaced(state.params), ema=ema)

    def frozen(self) -> dict:
        """Weights that steps read and never change, by module; see `larp_jax.training.frozen`.

        Raises:
          InputError: a file of weights is missing or damaged.
        """
        return self.networks.load()

    def frozen_shapes(self) -> dict:
        """Shapes and dtypes of what `frozen` returns, without its files."""
        return self.networks.shapes()

    def module(self, name: str, params: dict) -> nnx.Module:
        """The module of that name with its parameters, `params[name]`."""
        return nnx.merge(self.graphdefs[name], params[name])

    def trained(self, params: dict) -> dict:
        """What the optimizer of the tokenizer updates, of parameters by module. A discriminator has its own."""
        model = _model(params)
        if self.recipe.trained == "decoder":
            model["tokenizer"] = parts(model["tokenizer"])[1]
        return model

    def train_step(self, state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        """One update: of the discriminator if it is due, then of tokenizer and prior against the new discriminator.

        Both share one forward pass of the tokenizer. If the batch is split into parts (`accumulate`), activations are
        not kept, and the discriminator update repeats the forward pass.

        Args:
          state: donated by the trainer.
          batch: `video` uint8 [B, T, H, W, C]. With alignment also `features` [B, t, h, w, C], those of the teacher on
            the grid of the decoder's patches, if the teacher is not to compute them.
          key: the run's root key; the step's randomness is a function of it and `state.step`.
          frozen: as returned by `frozen`.

        Returns:
          The next state and float32 scalars by name; those of the discriminator are from its last update.
        """
        recipe = self.recipe
        key = jax.random.fold_in(key, state.step)
        params, opt_state, model, last = state.params, state.opt_state, self.trained(state.params), {}
        clips = {name: batch[name] for name in ("video", "features") if name in batch}

        def forward(i, clips):
            """(reconstruction, the other losses), pullback, (codes, logs)"""
            clips, part_key = clips | {"video": as_float_video(clips["video"])}, jax.random.fold_in(key, i)
            f = functools.partial(self._forward, clips=clips, step=state.step + 1, key=part_key, frozen=frozen)
            return jax.vjp(lambda model: f(common.merged(_model(params), model)), model, has_aux=True)

        if recipe.accumulate == 1:
            once = forward(0, clips)
            forward = lambda *_: once  # noqa: E731

        if self.adversary is not None:
            before, reconstruct = (x["discriminator"] for x in (params, opt_state)), lambda *part: forward(*part)[0][0]
            after, its_state = self.adversary.updated_if_due(
                state.step, *before, clips, reconstruct, key, frozen
            )
            params, opt_state = params | {"discriminator": after}, opt_state | {"discriminator": its_state}
            last = its_state["last"]

        def gradient(i, clips):
            (reconstruction, _), pullback, (codes, logs) = forward(i, clips)
            video = clips["video"]
            part_key = jax.random.fold_in(key, 2 * recipe.accumulate + i)
            (loss, terms), cotangent = jax.value_and_grad(self._reconstruction_losses, has_aux=True)(
                reconstruction, as_float_video(video), params, frozen, state.step, part_key
            )
            (grads,) = pullback((cotangent, jnp.ones(())))
            logs = logs | terms | {"loss": loss + logs["loss"]}
            logs |= self._image_quality(state.step, as_float_video(video), jnp.clip(reconstruction, 0.0, 1.0))
            return grads, codes, logs

        grads, codes, logs = common.mean_over_parts(gradient, recipe.accumulate, clips)
        updates, tokenizer_state = self.optimizer.update(grads, opt_state["tokenizer"], model)
        model = optax.apply_updates(model, updates)
        ema = state.ema
        if ema:  # only of what is trained: of equal numbers it would differ by rounding
            ema = common.merged(ema, optax.incremental_update(model, self.trained(ema), 1.0 - recipe.optim.ema_decay))

        logs |= last
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step + 1)
        if codes is not None:
            logs["temperature"] = self.temperature(state.step + 1)
            logs["usage_batch"] = metrics.codebook_usage(codes)
            logs["perplexity"] = metrics.perplexity(codes)
            logs["kl_from_uniform"] = metrics.kl_from_uniform(codes)
        opt_state = opt_state | {"tokenizer": tokenizer_state}
        return TrainState(state.step + 1, common.merged(params, model), opt_state, ema), logs

    def lengths(self, video: jax.Array, key: jax.Array | None, frozen: dict) -> jax.Array | None:
        """Numbers of codes of each block, [B, T] int32; None if every clip has the same number.

        Args:
          video: float [B, T, H, W, C].
          key: random key of the draw; None for the largest uniform numbers in its place, as in evaluation.
          frozen: as returned by `frozen`.
        """
        model, budget = self.recipe.model, self.recipe.budget
        if model.adaptive is None:
            return None
        if budget == AUTO:
            return self.module("router", frozen).lengths(video)
        if budget != RANDOM:
            return repeated(model.adaptive.budget(budget, model.quantizer.codes), len(video))
        if key is None:
            return repeated(model.adaptive.largest, len(video))
        assignments = jnp.asarray(model.adaptive.assignments, jnp.int32)
        return assignments[jax.random.randint(key, (len(video),), 0, len(assignments))]

    def _forward(self, model: dict, *, clips, step, key, frozen):
        """Tokenizer and prior: ((reconstruction, weighted sum of their own losses), (code frequencies, logs)).

        `step` counts from 1, as the schedules do.
        """
        recipe, video = self.recipe, clips["video"]
        sample_key, prior_key = jax.random.split(key)
        tokenizer = self.module("tokenizer", model)
        share = self.share(step - self.continuous_steps) if self.continuous_steps else 1.0
        lengths = self.lengths(video, jax.random.fold_in(key, LENGTHS), frozen)
        seen, corrupted = None, recipe.corruption
        if corrupted.of_encoder:
            lengths, seen = corruption.view(recipe, video.shape, lengths, jax.random.fold_in(key, VIEW))
        quantized = tokenizer.quantize(
            video, lengths, seen=seen, temperature=self.temperature(step), share=share,
            key=sample_key if recipe.trained == "all" else None,
        )  # fmt: skip
        z_q = quantized.z_q
        if corrupted.noise:
            z_q = corruption.noisy(z_q, corrupted.noise, jax.random.fold_in(key, NOISE), quantized.valid)
        if "projector" in model:
            reconstruction, features = tokenizer.decode_with_features(
                z_q, quantized.lengths, recipe.loss.alignment_layer, video.shape[1:4]
            )
        else:
            reconstruction = tokenizer.decode_latents(z_q, quantized.lengths, video.shape[1:4])
        logs = {f"quantizer_{name}": value for name, value in quantized.terms.items()}
        logs["loss_quantizer"] = quantized.loss
        loss = recipe.loss.quantizer_weight * share * quantized.loss
        if "prior" in model:
            terms = self._prior_losses(model, quantized, tokenizer.quantizer.codebook, step, prior_key)
            loss += recipe.loss.prior_weight * share * terms["loss_prior"]
            logs |= terms
        if "projector" in model:
            logs["loss_alignment"] = self._alignment_loss(model, frozen, clips, features)
            loss += recipe.loss.alignment_weight * logs["loss_alignment"]
        codes = None
        if quantized.indices is not None:
            codes = metrics.code_counts(quantized.indices, recipe.model.quantizer.codebook_size, quantized.valid)
            logs["usage_clip"] = metrics.codebook_usage(codes).mean()
            codes = codes.sum(axis=0).astype(jnp.float32)
        logs["loss"] = loss
        return (reconstruction, loss), (codes, logs)

    def _prior_losses(self, model: dict, quantized: Quantized, codebook, step, key) -> dict[str, jax.Array]:
        """`loss_prior`, unweighted, and the accuracy of the prior if it predicts codes."""
        prior, config, valid = self.module("prior", model), self.recipe.prior, quantized.valid
        if quantized.lengths is not None:
            prior = functools.partial(prior, layout=layout(quantized.lengths, quantized.z.shape[1])[:, :-1])
        passed = jax.lax.stop_gradient if config.detached else lambda x: x
        if config.objective == "latent":
            return {"loss_prior": losses.next_latent_loss(prior, passed(quantized.z), key=key, valid=valid)}
        mix_ratio = self.mix_ratio(step)
        loss, accuracy = losses.prior_loss(
            prior, config, passed(quantized.z_q), quantized.indices, codebook, key=key, mix_ratio=mix_ratio, valid=valid
        )
        return {"loss_prior": loss, **accuracy}

    def _alignment_loss(self, model: dict, frozen: dict, clips: dict, features: jax.Array) -> jax.Array:
        """The alignment of the decoder's features [B, t, h, w, D] with those of the teacher, a scalar."""
        target = clips.get("features")
        if target is None:
            target = resampled(self.module("teacher", frozen)(clips["video"]), features.shape[1:4])
        projected = self.module("projector", model)(features)
        return losses.alignment_loss(projected, jax.lax.stop_gradient(target.astype(jnp.float32)))

    def _reconstruction_losses(self, reconstruction, video, params, frozen, step, key):
        """The losses of the reconstruction: their weighted sum, and each unweighted by name."""
        weights = self.recipe.loss
        terms = {"reconstruction": losses.reconstruction_loss(video, reconstruction, weights.reconstruction)}
        if weights.frame_difference_weight:
            changes = (jnp.diff(x, axis=1) for x in (video, reconstruction))
            terms["frame_difference"] = losses.reconstruction_loss(*changes, weights.reconstruction)
        if "lpips" in frozen:
            lpips, frames = self.module("lpips", frozen), slice(None)
            if weights.perceptual_frames:
                frames = jax.random.choice(key, video.shape[1], (weights.perceptual_frames,), replace=False)
            terms["perceptual"] = losses.perceptual_loss(lpips.distance, video[:, frames], reconstruction[:, frames])
        if self.adversary is not None:
            terms["adversarial"] = self.adversary.loss(params["discriminator"], reconstruction, step, frozen)
        total = sum(getattr(weights, f"{name}_weight", 1.0) * term for name, term in terms.items())
        return total, {f"loss_{name}": term for name, term in terms.items()}

    def _image_quality(self, step, video, reconstruction) -> dict[str, jax.Array]:
        """PSNR, and SSIM if frames are large enough. SSIM costs more and is computed only in logged steps."""
        quality = {"psnr": metrics.psnr(video, reconstruction).mean()}
        if min(video.shape[2:4]) >= metrics.SSIM_WINDOW:
            quality["ssim"] = jax.lax.cond(
                (step + 1) % self.recipe.log_every == 0,
                lambda: metrics.ssim(video, reconstruction).mean(),
                lambda: jnp.float32(jnp.nan),
            )
        return quality


def _model(params: dict) -> dict:
    """All modules but the discriminator, trained together: tokenizer, prior and projector."""
    return {name: x for name, x in params.items() if name != "discriminator"}


# ---------------------------------------------------------------------------------------- what a run reads and measures


class TokenizerTask:
    """A run of stage 1, as `larp_jax.training.stages.Task` defines it."""

    stage_class = TokenizerStage
    inputs: tuple[str, ...] = ("video",)
    shown = ("loss", "loss_reconstruction", "loss_prior", "loss_alignment", "loss_adversarial", "psnr", "perplexity")
    only_logged = ("ssim",)

    def __init__(self, recipe: TokenizerRecipe, mesh: Mesh):
        self.recipe, self._mesh = recipe, mesh
        self._features = open_features(recipe) if recipe.data.has_features else None
        self.stage = self.stage_class(recipe)
        self.frozen = jax.device_put(self.stage.frozen(), sharding.replicated(mesh))
        router = self.frozen.get("router")
        self._router = None if router is None else digest("", jax.device_get(router))
        self._digests = self.stage.networks.digests()
        model = recipe.model
        self._clip = common.clip_spec(model, recipe.data)
        if self._features is None:
            source = data.open_source(recipe.data.train, self._clip)
            self._identity = common.data_identity(map(source.name, range(len(source))))
        else:
            self.inputs = ("video", "features")
            self._identity = common.data_identity(self._features.names())
        self._evaluator = self._code_counts = None
        self._coded_from = self.stage.continuous_steps and self.stage.continuous_steps + recipe.start.ramp_steps

    def after_step(self, state, step, placement, key):
        """The state, with a codebook from training clips after the last continuous step."""
        if step != self.stage.continuous_steps:
            return state
        part = self.recipe.data.batch_size
        clips = self._some_clips(-(-self.recipe.start.kmeans_clips // part) * part)
        clips = jax.device_put(clips.reshape(-1, part, *clips.shape[1:]), sharding.replicated(self._mesh))
        logger.info("step %d: the codebook becomes the k-means of the latents of %d clips", step, clips.shape[0] * part)
        set_codebook = jax.jit(self.stage.set_codebook, donate_argnums=0, out_shardings=placement)
        return set_codebook(state, clips, jax.random.fold_in(key, step), self.frozen)

    def open_evaluation(self, workdir):
        """Opens the evaluation clips, and computes the mean training clip or reads it from the workdir."""
        recipe = self.recipe
        logger.info("a clip is encoded to %s", recipe.model.encoded_as)  # not before a wrong workdir is refused
        if not recipe.data.eval:
            return
        path = workdir / checkpoint.MEAN_CLIP
        if path.exists():
            mean_clip = checkpoint.read_mean_clip(path, recipe.model.clip_shape)
        else:
            # the best reconstruction without any information in the codes
            mean_clip = self._some_clips(MEAN_CLIP_CLIPS).mean(axis=0) / 255.0
            if jax.process_index() == 0:
                checkpoint.write_mean_clip(workdir, mean_clip)
        self._evaluator = ReconstructionEvaluator(
            lambda params: self.stage.module("tokenizer", params),
            ClipSet(recipe.data.eval, self._clip, max_clips=recipe.data.eval_clips),
            self._mesh,
            default_metrics(available(recipe, self.stage.graphdefs), recipe, mean_clip=mean_clip),
            batch_size=recipe.data.batch_size,
            lengths=lambda params, video: self.stage.lengths(video, None, params),
        )

    def batches(self, start_step):
        """This process's rows of the batches of clips from a step on."""
        return common.train_clips(self.recipe, self._clip, start_step, self._features)

    def watch(self, step, logs):
        """Warns if all codes collapse to one."""
        if logs.get("perplexity", math.inf) < 2.0 and step >= self._coded_from + 10 * self.recipe.log_every:
            logger.warning(
                "step %d: codes have collapsed (perplexity %.2f); see \"Small runs\" in the README",
                step,
                logs["perplexity"],
            )

    def evaluate(self, state, step, writer):
        """Writes the scores of reconstructions, and examples next to their originals; returns the scores."""
        if self._evaluator is None:
            return {}
        router = {name: x for name, x in self.frozen.items() if name == "router"}
        scores, extras = self._evaluator.run((state.ema or state.params) | router)
        self._code_counts = None if extras["codes"] is None else extras["codes"].counts.sum(axis=0)
        common.write_scores(scores, step, writer)
        if scores["psnr"] < scores["psnr_mean_clip"] + 0.1 and step > self._coded_from + self.recipe.steps // 10:
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
        """Identity of the training data and of frozen networks, and how often the last evaluation used each code."""
        counts = {} if self._code_counts is None else {"code_counts": self._code_counts.tolist()}
        router = {} if self._router is None else {"router_fingerprint": self._router}
        return {"data": self._identity, "frozen": self._digests} | counts | router

    def resume(self, metadata):
        """Restores the code counts; checks that frozen networks are the same; warns if the training data changed."""
        if self._router != metadata.get("router_fingerprint", self._router):
            raise InputError(
                f"router={self.recipe.router} is another than before; give that one, or another --workdir"
            )
        self.stage.networks.check(self._digests, metadata.get("frozen", {}))
        common.warn_if_data_changed(metadata, self._identity)
        if (counts := metadata.get("code_counts")) is not None:
            self._code_counts = np.asarray(counts, np.int64)

    def _some_clips(self, count: int) -> np.ndarray:
        """Training clips, uint8 [count, T, H, W, 3], the same on every process and in every run of this seed."""
        videos, spec, options = [], self.recipe.data.train, {"batch_size": 16, "seed": self.recipe.seed}
        with (
            data.train_batches(spec, self._clip, **options)
            if self._features is None
            else self._features.batches(**options)
        ) as batches:
            while len(videos) * 16 < count:
                videos.append(next(batches)["video"])
        return np.concatenate(videos)[:count]
