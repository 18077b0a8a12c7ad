"""The jitted steps of each stage. One class a stage; the trainer knows only its `init` and `train_step`.

A stage's methods are pure functions of arrays, ready for `jax.jit`: nothing here knows of meshes or loops.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from larp_jax import metrics
from larp_jax.config import GeneratorRecipe, TokenizerConfig, TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.models.data_init import data_init
from larp_jax.models.discriminator import Discriminator
from larp_jax.models.generator import Generator
from larp_jax.models.generator_codes import encode_batch, score_batch
from larp_jax.models.lpips import Lpips
from larp_jax.models.next_code import NextCode
from larp_jax.models.paths import path_name
from larp_jax.models.pixels import as_float_video
from larp_jax.models.prior import Prior
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.state import TrainState
from larp_jax.training import losses, optim
from larp_jax.weights import perceptual

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LECAM_DECAY = 0.999  # METHOD 3


def mean_over_parts(f: Callable, parts: int, x):
    """The mean of `f(i, part)` over equal parts of x, arrays [B, ...], taken one after the other.

    Part i holds the rows i, i + parts, ...: where the batch is split over devices, each device works on its own rows.

    Args:
      f: returns a pytree of floats.
      parts: number of parts; 1 calls f once, on all of x.
      x: a pytree; B is divisible by `parts`.
    """
    if parts == 1:
        return f(0, x)
    x = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1), x)
    shapes = jax.eval_shape(f, 0, jax.tree.map(lambda x: x[0], x))
    total = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, f(*part)), None

    total, _ = jax.lax.scan(add, total, (jnp.arange(parts), x))
    return jax.tree.map(lambda y: y / parts, total)


class TokenizerStage:
    """Stage 1: tokenizer, prior and discriminator trained together (METHOD 3)."""

    def __init__(self, recipe: TokenizerRecipe):
        self.recipe = recipe
        loss = recipe.loss
        make = {"tokenizer": self._make_tokenizer}
        if loss.prior_weight:
            make["prior"] = self._make_prior
        if loss.adversarial_weight:
            make["discriminator"] = self._make_discriminator
        self._make = make
        frozen = {"lpips": self._make_lpips} if loss.perceptual != "none" else {}
        self._abstract = {name: nnx.eval_shape(lambda m=m: m(nnx.Rngs(0))) for name, m in (make | frozen).items()}
        self.graphdefs = {name: nnx.graphdef(module) for name, module in self._abstract.items()}
        self._check_multipliers()
        self.optimizer = optim.make_optimizer(recipe.optim, recipe.steps)
        self.discriminator_optimizer = optim.make_discriminator_optimizer(
            recipe.optim, recipe.steps, start=loss.adversarial_start, every=loss.discriminator_every
        )
        self.learning_rate = optim.learning_rate(recipe.optim, recipe.steps)
        quantizer = recipe.model.quantizer
        self.temperature = optim.linear(
            quantizer.temperature_start or quantizer.temperature,
            quantizer.temperature,
            quantizer.temperature_ramp * recipe.steps,
        )
        self.mix_ratio = optim.linear(0.0, recipe.prior.mix_max, recipe.prior.mix_ramp * recipe.steps)

    def _check_multipliers(self) -> None:
        """`InputError` where a multiplier is for no parameter. Those of a prior may stay where there is none."""
        modules = {name: self._abstract[name] for name in ("tokenizer", "prior") if name in self._make}
        params = {name: nnx.to_pure_dict(nnx.state(module, nnx.Param)) for name, module in modules.items()}
        names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        paths = {name[:end] for name in names for end in [i for i, c in enumerate(name) if c == "/"] + [len(name)]}
        for wanted in self.recipe.optim.multipliers:
            if wanted not in paths and wanted.partition("/")[0] not in {"prior"} - modules.keys():
                near = difflib.get_close_matches(wanted, paths, n=1, cutoff=0.0)[0]
                raise InputError(f"optim.multipliers: {wanted} is no parameter, nor above any; did you mean {near}?")

    def _make_tokenizer(self, rngs: nnx.Rngs) -> Tokenizer:
        r = self.recipe
        return Tokenizer(r.model, rngs=rngs, remat=r.remat, dtype=DTYPES[r.precision])

    def _make_prior(self, rngs: nnx.Rngs) -> Prior:
        r = self.recipe
        quantizer = r.model.quantizer
        return Prior(
            r.prior, r.model.num_tokens, quantizer.code_dim, rngs=rngs, remat=r.remat, dtype=DTYPES[r.precision]
        )

    def _make_discriminator(self, rngs: nnx.Rngs) -> Discriminator:
        r = self.recipe
        # R1 is differentiated twice, which cuDNN's attention in half precision is not made for
        dtype = jnp.float32 if r.loss.r1_weight else DTYPES[r.precision]
        return Discriminator(r.discriminator, r.model.clip_shape, rngs=rngs, remat=r.remat, dtype=dtype)

    def _make_lpips(self, rngs: nnx.Rngs) -> Lpips:
        return Lpips(rngs=rngs, dtype=DTYPES[self.recipe.precision])

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""
        params = {
            name: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(jax.random.fold_in(key, i))), nnx.Param))
            for i, (name, make) in enumerate(self._make.items())
        }
        model = _model(params)
        opt_state = {"tokenizer": self.optimizer.init(model)}
        if "discriminator" in params:
            names = ["loss_discriminator", "loss_lecam", "logits_real", "logits_fake", "lecam_real", "lecam_fake"]
            names += ["loss_r1"] if self.recipe.loss.r1_weight else []
            opt_state["discriminator"] = {
                "optimizer": self.discriminator_optimizer.init(params["discriminator"]),
                # its last update in numbers, kept to be logged until the next; LeCam's running means are among them
                "last": {name: jnp.zeros(()) for name in names},
            }
        ema = jax.tree.map(jnp.copy, model) if self.recipe.optim.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)

    def data_init(self, state: TrainState, video: jax.Array, key: jax.Array) -> TrainState:
        """The state before the first step with the tokenizer started from clips: `larp_jax.models.data_init`."""
        tokenizer = self.module("tokenizer", state.params)
        data_init(tokenizer, as_float_video(video), key)
        params = state.params | {"tokenizer": nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param))}
        ema = jax.tree.map(jnp.copy, _model(params)) if state.ema else {}
        return dataclasses.replace(state, params=params, ema=ema)

    def frozen(self) -> dict:
        """Weights that steps read and never change, by module: `lpips`, where the recipe wants it.

        Raises:
          InputError: their file is missing or broken.
        """
        name = self.recipe.loss.perceptual
        if name == "none":
            return {}
        try:
            lpips = perceptual.load_lpips(None if name == "lpips" else name)
        except InputError as error:
            raise InputError(f"loss.perceptual={name!r}: {error}; or choose loss.perceptual='none'") from error
        return {"lpips": nnx.to_pure_dict(nnx.state(lpips, nnx.Param))}

    def frozen_shapes(self) -> dict:
        """Shapes and dtypes of what `frozen` returns, without its file."""
        shapes = {name: m for name, m in self._abstract.items() if name not in self._make}
        return {name: nnx.to_pure_dict(nnx.state(m, nnx.Param)) for name, m in shapes.items()}

    def module(self, name: str, params: dict) -> nnx.Module:
        """The module of that name with the parameters of the tree under it."""
        return nnx.merge(self.graphdefs[name], params[name])

    def train_step(self, state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        """One update: of the discriminator in its turn, then of tokenizer and prior against the updated discriminator.

        Both use one forward pass of the tokenizer. Where the batch is taken in parts (`accumulate`) its residuals are
        not kept, and the discriminator's turn runs the pass again.

        Args:
          state: donated by the trainer.
          batch: `video` uint8 [B, T, H, W, C].
          key: the run's root key; the step's randomness is a function of it and `state.step`.
          frozen: what the method of that name returned.

        Returns:
          The next state and float32 scalars by name; what concerns the discriminator's update is of its last one.
        """
        recipe = self.recipe
        key = jax.random.fold_in(key, state.step)
        params, opt_state, model, last = state.params, state.opt_state, _model(state.params), {}

        def forward(i, video):
            """(reconstruction, what else is minimised), pullback, (codes, logs)"""
            video = as_float_video(video)
            f = functools.partial(self._forward, video=video, step=state.step + 1, key=jax.random.fold_in(key, i))
            return jax.vjp(f, model, has_aux=True)

        if recipe.accumulate == 1:
            once = forward(0, batch["video"])
            forward = lambda *_: once  # noqa: E731

        if "discriminator" in params:

            def turn(discriminator, opt_state):
                def gradient(i, video):
                    (reconstruction, _), _, _ = forward(i, video)
                    part_key = jax.random.fold_in(key, recipe.accumulate + i)
                    video = as_float_video(video)
                    return self.discriminator_gradient(discriminator, opt_state, video, reconstruction, part_key)

                grads, logs = mean_over_parts(gradient, recipe.accumulate, batch["video"])
                return self.discriminator_update(discriminator, opt_state, grads, logs)

            start, every = recipe.loss.adversarial_start, recipe.loss.discriminator_every
            its_turn = (state.step >= start) & (state.step % every == 0)
            same = lambda *unchanged: unchanged  # noqa: E731
            after = jax.lax.cond(its_turn, turn, same, params["discriminator"], opt_state["discriminator"])
            params, opt_state = (
                old | {"discriminator": new} for old, new in zip((params, opt_state), after, strict=True)
            )
            last = opt_state["discriminator"]["last"]

        def gradient(i, video):
            (reconstruction, _), pullback, (codes, logs) = forward(i, video)
            part_key = jax.random.fold_in(key, 2 * recipe.accumulate + i)
            (loss, terms), cotangent = jax.value_and_grad(self._reconstruction_losses, has_aux=True)(
                reconstruction, as_float_video(video), params, frozen, state.step, part_key
            )
            (grads,) = pullback((cotangent, jnp.ones(())))
            logs = logs | terms | {"loss": loss + logs["loss"]}
            logs |= self._picture_quality(state.step, as_float_video(video), jnp.clip(reconstruction, 0.0, 1.0))
            return grads, codes, logs

        grads, codes, logs = mean_over_parts(gradient, recipe.accumulate, batch["video"])
        updates, tokenizer_state = self.optimizer.update(grads, opt_state["tokenizer"], model)
        model = optax.apply_updates(model, updates)
        ema = optax.incremental_update(model, state.ema, 1.0 - recipe.optim.ema_decay) if state.ema else {}

        logs |= last
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step + 1)
        if codes is not None:
            logs["temperature"] = self.temperature(state.step + 1)
            logs["usage_batch"] = metrics.codebook_usage(codes)
            logs["perplexity"] = metrics.perplexity(codes)
            logs["kl_from_uniform"] = metrics.kl_from_uniform(codes)
        opt_state = opt_state | {"tokenizer": tokenizer_state}
        return TrainState(state.step + 1, params | model, opt_state, ema), logs

    def _forward(self, model: dict, *, video, step, key):
        """Tokenizer and prior: ((reconstruction, weighted sum of their own losses), (code frequencies, logs)).

        `step` counts from 1, as the schedules do.
        """
        recipe = self.recipe
        draw_key, prior_key = jax.random.split(key)
        tokenizer = self.module("tokenizer", model)
        reconstruction, quantized = tokenizer(video, key=draw_key, temperature=self.temperature(step))
        logs = {f"quantizer_{name}": value for name, value in quantized.terms.items()}
        logs["loss_quantizer"] = quantized.loss
        loss = recipe.loss.quantizer_weight * quantized.loss
        if "prior" in model:
            logs["loss_prior"], accuracy = losses.prior_loss(
                self.module("prior", model),
                recipe.prior,
                quantized.z_q,
                quantized.indices,
                tokenizer.quantizer.codebook,
                key=prior_key,
                mix_ratio=self.mix_ratio(step),
            )
            loss += recipe.loss.prior_weight * logs["loss_prior"]
            logs |= accuracy
        codes = None
        if quantized.indices is not None:
            codes = metrics.code_counts(quantized.indices, recipe.model.quantizer.codebook_size)
            logs["usage_clip"] = metrics.codebook_usage(codes).mean()
            codes = codes.sum(axis=0).astype(jnp.float32)
        logs["loss"] = loss
        return (reconstruction, loss), (codes, logs)

    def _reconstruction_losses(self, reconstruction, video, params, frozen, step, key):
        """The objective as a function of the reconstruction: the weighted sum of its terms, and each by name."""
        weights = self.recipe.loss
        terms = {"reconstruction": losses.reconstruction_loss(video, reconstruction, weights.reconstruction)}
        if frozen:
            lpips, frames = self.module("lpips", frozen), slice(None)
            if weights.perceptual_frames:
                frames = jax.random.choice(key, video.shape[1], (weights.perceptual_frames,), replace=False)
            terms["perceptual"] = losses.perceptual_loss(lpips.distance, video[:, frames], reconstruction[:, frames])
        if "discriminator" in params:
            discriminator = self.module("discriminator", params)
            terms["adversarial"] = losses.started(
                step >= weights.adversarial_start,
                lambda x: losses.adversarial_loss(weights.adversarial, discriminator(x)),
                reconstruction,
            )
        total = sum(getattr(weights, f"{name}_weight", 1.0) * term for name, term in terms.items())
        return total, {f"loss_{name}": term for name, term in terms.items()}

    def discriminator_gradient(
        self, params: dict, opt_state: dict, video: jax.Array, reconstruction: jax.Array, key: jax.Array
    ) -> tuple[dict, dict]:
        """Of the discriminator's objective on real clips and their reconstructions, both float [B, T, H, W, C].

        Args:
          params: the discriminator's.
          opt_state: the discriminator's; LeCam's running means are read from it.
          video: in [0, 1].
          reconstruction: no gradient reaches what made it.
          key: of the smoothed targets.

        Returns:
          The gradient and what is to be logged.
        """
        weights, before = self.recipe.loss, opt_state["last"]

        def objective(params):
            discriminator = self.module("discriminator", {"discriminator": params})
            real, fake = discriminator(video), discriminator(jax.lax.stop_gradient(reconstruction))
            loss = losses.discriminator_loss(weights.adversarial, real, fake, key)
            lecam = losses.lecam_loss(real, fake, before["lecam_real"], before["lecam_fake"])
            logs = {"loss_discriminator": loss, "loss_lecam": lecam}
            logs |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
            loss += weights.lecam_weight**2 * lecam  # the released code applies the weight twice
            if weights.r1_weight:
                logs["loss_r1"] = losses.r1_penalty(discriminator, video)
                loss += weights.r1_weight * logs["loss_r1"]
            return loss, logs

        return jax.grad(objective, has_aux=True)(params)

    def discriminator_update(self, params: dict, opt_state: dict, grads: dict, logs: dict) -> tuple[dict, dict]:
        """The discriminator's parameters and `opt_state` after its turn, from `discriminator_gradient`'s results."""
        updates, optimizer = self.discriminator_optimizer.update(grads, opt_state["optimizer"], params)
        averages = {
            f"lecam_{side}": optax.incremental_update(
                logs[f"logits_{side}"], opt_state["last"][f"lecam_{side}"], 1.0 - LECAM_DECAY
            )
            for side in ("real", "fake")
        }
        return optax.apply_updates(params, updates), {"optimizer": optimizer, "last": logs | averages}

    def _picture_quality(self, step, video, reconstruction) -> dict[str, jax.Array]:
        """PSNR always; SSIM (where frames are large enough) only in steps that are logged, as it costs more."""
        quality = {"psnr": metrics.psnr(video, reconstruction).mean()}
        if self.recipe.model.resolution >= metrics.SSIM_WINDOW:
            quality["ssim"] = jax.lax.cond(
                (step + 1) % self.recipe.log_every == 0,
                lambda: metrics.ssim(video, reconstruction).mean(),
                lambda: jnp.float32(jnp.nan),
            )
        return quality


def _model(params: dict) -> dict:
    """The modules that outlive training or are judged: all but the discriminator."""
    return {name: x for name, x in params.items() if name != "discriminator"}


class GeneratorStage:
    """Stage 2: a generator of a frozen tokenizer's codes (METHOD 4).

    A batch holds `video`, uint8 or float [B, T, H, W, C], which the frozen tokenizer turns into codes, or `codes`,
    [B, N] int32, and with frame prediction `condition`, likewise. `label` [B] int32 gives the classes (-1: none).

    Args:
      recipe: whose model is complete: no size is 0.
      tokenizer: whose parameters `train_step` is given; None where batches hold codes.
    """

    def __init__(self, recipe: GeneratorRecipe, tokenizer: TokenizerConfig | None = None):
        self.recipe, model = recipe, recipe.model
        self._make = lambda rngs: Generator(model, rngs=rngs, remat=recipe.remat, dtype=DTYPES[recipe.precision])
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
        """Shapes and dtypes of what `train_step` takes as `frozen`."""
        modules = {name: module for name, module in self._abstract.items() if name == "tokenizer"}
        return {name: nnx.to_pure_dict(nnx.state(module, nnx.Param)) for name, module in modules.items()}

    def module(self, name: str, params: dict) -> nnx.Module:
        """The module of that name with the parameters of the tree under it."""
        return nnx.merge(self.graphdefs[name], params[name])

    def codes(self, batch: dict, frozen: dict) -> dict:
        """The batch with `codes`, and with frame prediction `condition`, in place of its `video`.

        They are deterministic and computed in float32 whatever the recipe's precision: those that are written to disk.
        """
        if "video" not in batch:
            return batch
        cond_frames = self.recipe.cond_frames if self.recipe.model.frame_prediction else 0
        return encode_batch(self.module("tokenizer", frozen), batch, cond_frames=cond_frames)

    def score(self, params: dict, batch: dict, key: jax.Array | None = None) -> NextCode:
        """How the generator predicts the codes of a batch without video, [B, N] each; a key turns on dropout."""
        return score_batch(self.module("generator", params), batch, key=key)

    def train_step(self, state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        """One update.

        Args:
          state: donated by the trainer.
          batch: see the class.
          key: the run's root key; the step's randomness is a function of it and `state.step`.
          frozen: the tokenizer's parameters, `{"tokenizer": ...}`; empty where batches hold codes.

        Returns:
          The next state and float32 scalars by name.
        """
        recipe = self.recipe
        key = jax.random.fold_in(key, state.step)

        def gradient(i, part):
            part = self.codes(part, frozen)

            def objective(params):
                scored = self.score(params, part, jax.random.fold_in(key, i))
                loss = scored.cross_entropy.mean()
                return loss, {"loss": loss, **{f"top{n}": jnp.mean(scored.rank < n) for n in (1, 5)}}

            return jax.grad(objective, has_aux=True)(state.params)

        grads, logs = mean_over_parts(gradient, recipe.accumulate, batch)
        updates, opt_state = self.optimizer.update(grads, state.opt_state["generator"], state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - recipe.optim.ema_decay) if state.ema else {}
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step + 1)
        return TrainState(state.step + 1, params, {"generator": opt_state}, ema), logs


STAGES = {"tokenizer": TokenizerStage, "generator": GeneratorStage}
