"""The discriminator in training: its loss for the tokenizer, and its own updates (LARP, arXiv 2410.21264, 3.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from larp_jax.config import TokenizerRecipe
from larp_jax.models.discriminator import Discriminator, FeatureDiscriminator
from larp_jax.models.pixels import as_float_video
from larp_jax.models.teachers import Teacher
from larp_jax.training import common, losses, optim

LECAM_DECAY = 0.999  # the released code


class Adversary:
    """The discriminator of a run: pure functions of its parameters and its optimizer state.

    Args:
      recipe: with a positive `loss.adversarial_weight`.
      module: `module(name, params)` is the network of that name, `discriminator` or `trunk`, with `params[name]`.
      trunk: the frozen network whose features the discriminator reads, without weights; None if it reads pixels.
    """

    def __init__(self, recipe: TokenizerRecipe, module: Callable[[str, dict], nnx.Module], trunk: Teacher | None):
        self.recipe, self._module, self._trunk = recipe, module, trunk
        self.optimizer = optim.make_discriminator_optimizer(
            recipe.optim, recipe.steps, start=recipe.loss.adversarial_start, every=recipe.loss.discriminator_every
        )

    def make(self, rngs: nnx.Rngs) -> Discriminator | FeatureDiscriminator:
        """The network with initial weights: its trained part."""
        r = self.recipe
        # R1 needs second derivatives, which cuDNN's attention in half precision does not support
        dtype = jnp.float32 if r.loss.r1_weight else common.DTYPES[r.precision]
        if self._trunk is None:
            return Discriminator(r.discriminator, r.model.clip_shape, rngs=rngs, remat=r.remat, dtype=dtype)
        return FeatureDiscriminator(r.discriminator, self._trunk, r.model.clip_shape, rngs=rngs, dtype=dtype)

    def _logits(self, params: dict, frozen: dict) -> Callable[[jax.Array], jax.Array]:
        """A function from clips [B, T, H, W, C] to logits [B]."""
        discriminator = self._module("discriminator", {"discriminator": params})
        if self._trunk is None:
            return discriminator
        trunk, layers = self._module("trunk", frozen), self.recipe.discriminator.layers
        return lambda video: discriminator(trunk.hidden(video, layers))

    def init(self, params: dict) -> dict:
        """The optimizer state before the first step."""
        names = ["loss_discriminator", "loss_lecam", "logits_real", "logits_fake", "lecam_real", "lecam_fake"]
        names += ["loss_r1"] if self.recipe.loss.r1_weight else []
        # `last` is the logs of the last update, shown until the next one; they include the EMAs of LeCam
        return {"optimizer": self.optimizer.init(params), "last": {name: jnp.zeros(()) for name in names}}

    def loss(self, params: dict, reconstruction: jax.Array, step: jax.Array, frozen: dict) -> jax.Array:
        """The tokenizer's adversarial loss of reconstructions [B, T, H, W, C], a scalar; 0 until it starts."""
        weights, logits = self.recipe.loss, self._logits(params, frozen)
        return losses.started(
            step >= weights.adversarial_start,
            lambda x: losses.adversarial_loss(weights.adversarial, logits(x)),
            reconstruction,
        )

    def updated_if_due(
        self,
        step: jax.Array,
        params: dict,
        opt_state: dict,
        clips: dict,
        reconstruct: Callable,
        key: jax.Array,
        frozen: dict,
    ) -> tuple[dict, dict]:
        """Parameters and optimizer state after the update of this step, or unchanged if none is due.

        Args:
          step: number of finished steps.
          params: of the discriminator.
          opt_state: of the discriminator.
          clips: `video` uint8 [B, T, H, W, C], and what else `reconstruct` needs.
          reconstruct: `reconstruct(i, clips)` is the reconstruction of part i of the batch.
          key: random key of this step.
          frozen: weights that never change; see `larp_jax.training.frozen`.
        """
        weights, parts = self.recipe.loss, self.recipe.accumulate

        def update(params, opt_state):
            def gradient(i, clips):
                reconstruction, part_key = reconstruct(i, clips), jax.random.fold_in(key, parts + i)
                video = as_float_video(clips["video"])
                return self.gradient(params, opt_state, video, reconstruction, part_key, frozen)

            return self.update(params, opt_state, *common.mean_over_parts(gradient, parts, clips))

        is_due = (step >= weights.adversarial_start) & (step % weights.discriminator_every == 0)
        return jax.lax.cond(is_due, update, lambda *unchanged: unchanged, params, opt_state)

    def gradient(
        self,
        params: dict,
        opt_state: dict,
        video: jax.Array,
        reconstruction: jax.Array,
        key: jax.Array,
        frozen: dict,
    ) -> tuple[dict, dict]:
        """Gradient of the discriminator's objective on clips and their reconstructions, both float [B, T, H, W, C].

        Args:
          params: of the discriminator.
          opt_state: of the discriminator; contains the EMAs of LeCam.
          video: in [0, 1].
          reconstruction: treated as a constant.
          key: random key of the smoothed targets.
          frozen: as for `updated_if_due`.

        Returns:
          The gradient and the logs.
        """
        weights, before = self.recipe.loss, opt_state["last"]

        def objective(params):
            logits = self._logits(params, frozen)
            real, fake = logits(video), logits(jax.lax.stop_gradient(reconstruction))
            loss = losses.discriminator_loss(weights.adversarial, real, fake, key)
            lecam = losses.lecam_loss(real, fake, before["lecam_real"], before["lecam_fake"])
            logs = {"loss_discriminator": loss, "loss_lecam": lecam}
            logs |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
            loss += weights.lecam_weight**2 * lecam  # the released code applies the weight twice
            if weights.r1_weight:
                logs["loss_r1"] = losses.r1_penalty(logits, video)
                loss += weights.r1_weight * logs["loss_r1"]
            return loss, logs

        return jax.grad(objective, has_aux=True)(params)

    def update(self, params: dict, opt_state: dict, grads: dict, logs: dict) -> tuple[dict, dict]:
        """Parameters and optimizer state after an update by the results of `gradient`."""
        updates, optimizer = self.optimizer.update(grads, opt_state["optimizer"], params)
        averages = {
            f"lecam_{side}": optax.incremental_update(
                logs[f"logits_{side}"], opt_state["last"][f"lecam_{side}"], 1.0 - LECAM_DECAY
            )
            for side in ("real", "fake")
        }
        return optax.apply_updates(params, updates), {"optimizer": optimizer, "last": logs | averages}
