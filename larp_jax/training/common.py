"""What stages share: parts of a batch, training clips, the identity of data, scores."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from larp_jax import data
from larp_jax.config import DataConfig, GeneratorRecipe, TokenizerConfig, TokenizerRecipe
from larp_jax.data.features import FeatureSet
from larp_jax.state import TrainState
from larp_jax.training.writers import MetricWriter

logger = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def mean_over_parts(f: Callable, parts: int, x):
    """The mean of `f(i, part)` over equal parts of x, arrays [B, ...], computed one after the other.

    Part i contains the rows i, i + parts, ...: if the batch is split over devices, each device works on its own rows.

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


def merged(tree: dict, part: dict) -> dict:
    """Nested dictionaries with the leaves of `part`, which has some of their paths, in place of their own."""
    return tree | {name: merged(tree[name], x) if isinstance(x, dict) else x for name, x in part.items()}


def updated(
    state: TrainState, grads: dict, optimizer: optax.GradientTransformation, name: str, ema_decay: float
) -> TrainState:
    """The state after an update of its only module, `name`, by the gradients of `state.params`."""
    updates, opt_state = optimizer.update(grads, state.opt_state[name], state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay) if state.ema else {}
    return TrainState(state.step + 1, params, {name: opt_state}, ema)


def data_identity(names: Iterable[str]) -> dict[str, Any]:
    """Number of clips or videos and a digest of their names, which determine the order of training."""
    digest, count = hashlib.sha256(), 0
    for count, name in enumerate(names, 1):  # noqa: B007
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return {"count": count, "names": digest.hexdigest()[:16]}


def warn_if_data_changed(metadata: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Warns unless the `data_identity` stored in a checkpoint's metadata is the one of the training data now."""
    before = metadata.get("data", identity)
    if before != identity:
        logger.warning(
            "data.train has changed since the checkpoint was saved (%d videos, was %d): clips come in another order "
            "than in an uninterrupted run",
            identity["count"],
            before["count"],
        )


def clip_spec(model: TokenizerConfig, sampled: DataConfig) -> data.ClipSpec:
    """The training clips of a tokenizer."""
    return data.ClipSpec.of(model.clip_shape, flip=sampled.flip, fps=sampled.fps, stride=sampled.stride)


def train_clips(
    recipe: TokenizerRecipe | GeneratorRecipe,
    clip: data.ClipSpec,
    start_step: int,
    features: FeatureSet | None = None,
) -> data.Batches:
    """Training batches of clips from a step on; with features if the data is a folder of them."""
    options = {
        "batch_size": recipe.data.batch_size,
        "seed": recipe.seed,
        "start_step": start_step,
        "workers": recipe.data.workers,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if features is not None:
        return features.batches(**options)
    return data.train_batches(recipe.data.train, clip, shapes=recipe.data.sizes, **options)


def write_scores(scores: Mapping[str, float], step: int, writer: MetricWriter) -> None:
    """Writes and logs the scores of an evaluation, as `eval/NAME`."""
    writer.write_scalars(step, {f"eval/{name}": value for name, value in scores.items()})
    logger.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
