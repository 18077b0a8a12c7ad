"""Training of a router on the rewards of clips (EVATok, arXiv 2603.12267, section 3).

`RouterStage` is the jitted step, `RouterTask` the rest of a run; see `larp_jax.training.generator`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from larp_jax import data
from larp_jax.config import RouterRecipe
from larp_jax.data.rewards import RewardSet
from larp_jax.errors import InputError
from larp_jax.evaluation.router import RouterEvaluator
from larp_jax.models.pixels import as_float_video
from larp_jax.models.router import Router
from larp_jax.state import TrainState
from larp_jax.training import common, optim


class RouterStage:
    """A router, trained to choose the best assignment of clips.

    Args:
      recipe: its model is complete.
    """

    def __init__(self, recipe: RouterRecipe):
        self.recipe, model = recipe, recipe.model
        model.check_complete()
        self._make = lambda rngs: Router(model, rngs=rngs, remat=recipe.remat, dtype=common.DTYPES[recipe.precision])
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: self._make(nnx.Rngs(0))))
        self.optimizer = optim.make_generator_optimizer(recipe.optim, recipe.steps)
        self.learning_rate = optim.learning_rate(recipe.optim, recipe.steps)

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""
        params = {"router": nnx.to_pure_dict(nnx.state(self._make(nnx.Rngs(key)), nnx.Param))}
        ema = jax.tree.map(jnp.copy, params) if self.recipe.optim.ema_decay else {}
        return TrainState(jnp.zeros((), jnp.int32), params, {"router": self.optimizer.init(params)}, ema)

    def frozen_shapes(self) -> dict:
        """Nothing: `train_step` needs no frozen weights."""
        return {}

    def module(self, name: str, params: dict) -> nnx.Module:
        """The router with its parameters, `params[name]`."""
        return nnx.merge(self.graphdef, params[name])

    def train_step(self, state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        """One update: cross-entropy with the assignment of the highest reward, or squared errors of all rewards.

        Args:
          state: donated by the trainer.
          batch: `video` uint8 [B, T, H, W, C], `rewards` [B, assignments] float32.
          key: not used: the step has no randomness.
          frozen: empty.

        Returns:
          The next state and float32 scalars by name.
        """
        recipe = self.recipe

        def gradient(i, part):
            rewards = part["rewards"]
            best = rewards.argmax(axis=-1)

            def objective(params):
                outputs = self.module("router", params)(as_float_video(part["video"]))
                if recipe.objective == "best":
                    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, best).mean()
                else:  # less their mean, which is that of the clip and changes no choice
                    loss = jnp.square(outputs - rewards + rewards.mean(axis=-1, keepdims=True)).mean()
                chosen = outputs.argmax(axis=-1)
                own = jnp.take_along_axis(rewards, chosen[:, None], axis=1).mean()
                logs = {"loss": loss, "assignment_top1": jnp.mean(chosen == best)}
                return loss, logs | {"reward": own, "reward_best": rewards.max(axis=-1).mean()}

            return jax.grad(objective, has_aux=True)(state.params)

        grads, logs = common.mean_over_parts(gradient, recipe.accumulate, batch)
        logs["grad_norm"] = optax.tree.norm(grads)
        logs["learning_rate"] = self.learning_rate(state.step + 1)
        return common.updated(state, grads, self.optimizer, "router", recipe.optim.ema_decay), logs


# ---------------------------------------------------------------------------------------- what a run reads and measures


class RouterTask:
    """A run that trains a router, as `larp_jax.training.stages.Task` defines it.

    Raises:
      InputError: the data contains no rewards, or does not match the recipe.
    """

    stage_class = RouterStage
    inputs = ("video", "rewards")
    shown = ("loss", "assignment_top1", "reward")
    only_logged = ()

    def __init__(self, recipe: RouterRecipe, mesh: Mesh):
        self._mesh, self.frozen = mesh, {}
        self._train = _open(recipe.data.train, "data.train")
        self.recipe = _complete(recipe, self._train, f"data.train={recipe.data.train}")
        self._eval = None
        if spec := recipe.data.eval:
            self._eval = _open(spec, "data.eval")
            _complete(self.recipe, self._eval, f"data.eval={spec}")
        self._identity = common.data_identity(self._train.names())
        self._train.rewards  # noqa: B018  (read before anything is written: shards may be damaged)
        self.stage = self.stage_class(self.recipe)
        self._evaluator = None

    def after_step(self, state, step, placement, key):
        """The state unchanged."""
        return state

    def open_evaluation(self, workdir):
        """Prepares the choices for the evaluation clips."""
        if self._eval is not None:
            self._evaluator = RouterEvaluator(
                lambda params: self.stage.module("router", params),
                self._eval,
                self._mesh,
                batch_size=self.recipe.data.batch_size,
                max_clips=self.recipe.data.eval_clips,
            )

    def batches(self, start_step):
        """This process's rows of the batches of clips from a step on, with their rewards."""
        recipe = self.recipe
        batches = self._train.train_batches(
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
            start_step=start_step,
            workers=recipe.data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return data.Batches(batches.source, _WithRewards(batches, self._train))

    def watch(self, step, logs):
        """Nothing to warn of."""

    def evaluate(self, state, step, writer):
        """Writes the scores of the choices for the evaluation clips; returns them."""
        if self._evaluator is None:
            return {}
        scores = self._evaluator.run(state.ema or state.params)
        common.write_scores(scores, step, writer)
        return scores

    def metadata(self):
        """The fingerprint of the tokenizer and the identity of the training data."""
        return {"tokenizer_fingerprint": self.recipe.tokenizer_fingerprint, "data": self._identity}

    def resume(self, metadata):
        """Warns if the training data has changed."""
        common.warn_if_data_changed(metadata, self._identity)


class _WithRewards:
    """Batches of a `RewardSet` with the `rewards` of their clips."""

    def __init__(self, batches: data.Batches, clips: RewardSet):
        self._batches, self._clips = batches, clips

    def __next__(self):
        batch = next(self._batches)
        return batch | {"rewards": self._clips.rewards[batch["row"]]}

    def close(self):
        self._batches.close()


def _open(spec: str, setting: str) -> RewardSet:
    parsed = data.parse_spec(spec)
    if parsed.kind != "rewards":
        raise InputError(f"{setting}={spec}: a router trains on rewards; run larp-jax allocate, and give rewards:DIR")
    return RewardSet(parsed.name)


def _complete(recipe: RouterRecipe, clips: RewardSet, where: str) -> RouterRecipe:
    """The recipe with what the rewards tell filled in; `InputError` if it has something else."""
    manifest, model = clips.manifest, recipe.model
    if recipe.tokenizer_fingerprint not in ("", manifest["fingerprint"]):
        raise InputError(
            f"{where} is of tokenizer {manifest['fingerprint']}, not of {recipe.tokenizer_fingerprint}; give what is of"
            " one tokenizer"
        )
    found = {
        "frames": clips.clip.frames,
        "resolution": min(clips.clip.size),
        "shape": () if len(set(clips.clip.size)) == 1 else clips.clip.size,
        "num_tokens": clips.ladder.bucket,
        "blocks": clips.ladder.blocks,
        "ladder": clips.ladder.rungs,
    }
    for name, value in found.items():
        wanted = getattr(model, name)
        if wanted and wanted != value:
            raise InputError(f"model.{name}={wanted}, but {where} has {value}; leave it out")
    model = dataclasses.replace(model, **found)
    return dataclasses.replace(recipe, model=model, tokenizer_fingerprint=manifest["fingerprint"])
