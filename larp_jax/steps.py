"""The jitted steps of each stage. One class a stage; the trainer knows only its `init`, `train_step` and `eval_step`.

A stage's methods are pure functions of arrays, ready for `jax.jit`: nothing here knows of meshes, files or loops.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from larp_jax import losses, metrics, optim
from larp_jax.config import TokenizerRecipe
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

        logs["psnr"] = metrics.psnr(video, jnp.clip(reconstruction, 0.0, 1.0)).mean()
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step)
        if indices is not None:
            logs["temperature"] = temperature
            logs |= code_statistics(indices, recipe.model.quantizer.codebook_size)
        return TrainState(state.step + 1, params, opt_state, ema), logs


def code_statistics(indices: jax.Array, codebook_size: int) -> dict[str, jax.Array]:
    """Usage of the codebook by a batch [B, N]: shares of codes used, perplexity, KL from uniform (nats)."""
    counts = jnp.zeros((codebook_size,), jnp.float32).at[indices.reshape(-1)].add(1.0)
    probs = counts / counts.sum()
    entropy = -jnp.sum(probs * jnp.log(jnp.maximum(probs, 1e-12)))
    ordered = jnp.sort(indices, axis=1)
    distinct = 1.0 + jnp.sum(ordered[:, 1:] != ordered[:, :-1], axis=1)
    return {
        "usage_batch": jnp.mean(counts > 0),
        "usage_clip": jnp.mean(distinct) / codebook_size,
        "perplexity": jnp.exp(entropy),
        "kl_uniform": jnp.log(codebook_size) - entropy,
    }
