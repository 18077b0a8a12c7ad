"""The jitted steps of each stage. One class a stage; the trainer knows only its `init`, `train_step` and `eval_step`.

A stage's methods are pure functions of arrays, ready for `jax.jit`: nothing here knows of meshes, files or loops.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from larp_jax import losses, metrics, optim
from larp_jax.config import TokenizerRecipe
from larp_jax.models.data_init import data_init
from larp_jax.models.prior import Prior
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.state import TrainState

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def as_float_video(video: jax.Array) -> jax.Array:
    """uint8 [B, T, H, W, C] -> float32 in [0, 1]; floats pass."""
    return video.astype(jnp.float32) / 255.0 if video.dtype == jnp.uint8 else video


class TokenizerStage:
    """Stage 1: tokenizer and prior trained together (METHOD 3)."""

    def __init__(self, recipe: TokenizerRecipe):
        self.recipe = recipe
        make = {"tokenizer": self._make_tokenizer}
        if recipe.loss.prior_weight:
            make["prior"] = self._make_prior
        self._make = make
        self.graphdefs = {name: nnx.graphdef(nnx.eval_shape(lambda m=m: m(nnx.Rngs(0)))) for name, m in make.items()}
        self.optimizer = optim.make_optimizer(recipe.optim, recipe.steps)
        self.learning_rate = optim.learning_rate(recipe.optim, recipe.steps)
        quantizer = recipe.model.quantizer
        self.temperature = optim.linear(
            quantizer.temperature_start or quantizer.temperature,
            quantizer.temperature,
            quantizer.temperature_ramp * recipe.steps,
        )
        self.mix_ratio = optim.linear(0.0, recipe.prior.mix_max, recipe.prior.mix_ramp * recipe.steps)

    def _make_tokenizer(self, rngs: nnx.Rngs) -> Tokenizer:
        r = self.recipe
        return Tokenizer(r.model, rngs=rngs, remat=r.remat, dtype=DTYPES[r.precision])

    def _make_prior(self, rngs: nnx.Rngs) -> Prior:
        r = self.recipe
        quantizer = r.model.quantizer
        return Prior(
            r.prior, r.model.num_tokens, quantizer.code_dim, rngs=rngs, remat=r.remat, dtype=DTYPES[r.precision]
        )

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""
        params = {
            name: nnx.to_pure_dict(nnx.state(make(nnx.Rngs(jax.random.fold_in(key, i))), nnx.Param))
            for i, (name, make) in enumerate(self._make.items())
        }
        ema = jax.tree.map(jnp.copy, params) if self.recipe.optim.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), ema)

    def data_init(self, state: TrainState, video: jax.Array, key: jax.Array) -> TrainState:
        """The state before the first step with the tokenizer started from clips: `larp_jax.models.data_init`."""
        tokenizer = self.module("tokenizer", state.params)
        data_init(tokenizer, as_float_video(video), key)
        params = state.params | {"tokenizer": nnx.to_pure_dict(nnx.state(tokenizer, nnx.Param))}
        ema = jax.tree.map(jnp.copy, params) if state.ema else {}
        return dataclasses.replace(state, params=params, ema=ema)

    def module(self, name: str, params: dict) -> nnx.Module:
        """The module `tokenizer` or `prior` with the parameters of the tree under that name."""
        return nnx.merge(self.graphdefs[name], params[name])

    def train_step(self, state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        """One update.

        Args:
          state: donated by the trainer.
          batch: `video` uint8 [B, T, H, W, C].
          key: the run's root key; the step's randomness is a function of it and `state.step`.

        Returns:
          The next state and float32 scalars by name.
        """
        recipe = self.recipe
        video = as_float_video(batch["video"])
        draw_key, prior_key = jax.random.split(jax.random.fold_in(key, state.step))
        temperature = self.temperature(state.step)

        def objective(params):
            tokenizer = self.module("tokenizer", params)
            reconstruction, quantized = tokenizer(video, key=draw_key, temperature=temperature)
            terms = {
                "reconstruction": losses.reconstruction_loss(video, reconstruction, recipe.loss.reconstruction),
                "quantizer": quantized.loss,
            }
            aux = {f"quantizer_{name}": value for name, value in quantized.terms.items()}
            if "prior" in self.graphdefs:
                terms["prior"], accuracy = losses.prior_loss(
                    self.module("prior", params),
                    recipe.prior,
                    quantized.z_q,
                    quantized.indices,
                    tokenizer.quantizer.codebook,
                    key=prior_key,
                    mix_ratio=self.mix_ratio(state.step),
                )
                aux |= accuracy
            weights = {
                "reconstruction": 1.0,
                "quantizer": recipe.loss.quantizer_weight,
                "prior": recipe.loss.prior_weight,
            }
            total = sum(weights[name] * term for name, term in terms.items())
            aux |= {f"loss_{name}": term for name, term in terms.items()} | {"loss": total}
            return total, (aux, reconstruction, quantized.indices)

        grads, (logs, reconstruction, indices) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - recipe.optim.ema_decay) if state.ema else {}

        logs |= self._picture_quality(state.step, video, jnp.clip(reconstruction, 0.0, 1.0))
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step)
        if indices is not None:
            logs["temperature"] = temperature
            counts = metrics.code_counts(indices, recipe.model.quantizer.codebook_size)
            logs["usage_clip"] = metrics.codebook_usage(counts).mean()
            counts = counts.sum(axis=0)
            logs["usage_batch"] = metrics.codebook_usage(counts)
            logs["perplexity"] = metrics.perplexity(counts)
            logs["kl_from_uniform"] = metrics.kl_from_uniform(counts)
        return TrainState(state.step + 1, params, opt_state, ema), logs

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


STAGES = {"tokenizer": TokenizerStage}
