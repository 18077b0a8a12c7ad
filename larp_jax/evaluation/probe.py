"""A classifier trained on real clips, which then measures samples: class accuracy and a Frechet distance.

Its numbers compare models of one experiment. They are neither FVD nor the accuracy of a published network, and the
features see only what distinguishes the classes of the training data.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from larp_jax import data, files, npz
from larp_jax.data import ClipSpec
from larp_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from larp_jax.models.classifier import Classifier
from larp_jax.models.paths import path_name
from larp_jax.models.pixels import as_float_video
from larp_jax.runtime import rng
from larp_jax.runtime.progress import Progress

BATCH = 16
LEARNING_RATE = 2e-3
BLURS, NOISE = (1, 1, 2, 4), 0.03  # factors by which frames are reduced and enlarged again; standard deviation


class ClipProbe:
    """The trained classifier.

    Args:
      clip_shape: [T, H, W, C] of the clips.
      params: parameters of a `Classifier`.
    """

    def __init__(self, clip_shape: tuple[int, int, int, int], params: dict):
        self.params = params
        graphdef = nnx.graphdef(_abstract(clip_shape, len(params["head"]["bias"])))

        @jax.jit
        def apply(params, video):
            classifier = nnx.merge(graphdef, params)
            features = classifier.features(as_float_video(video))
            return features, classifier.head(features)

        self._apply = apply

    def measure(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [M, 64] float32 and predicted classes [M] int of clips, uint8 or floats [M, T, H, W, C]."""
        found = []
        for start in range(0, len(clips), BATCH):
            part = clips[start : start + BATCH]
            padded = np.concatenate([part, np.repeat(part[-1:], BATCH - len(part), axis=0)])
            found.append([np.asarray(x)[: len(part)] for x in self._apply(self.params, padded)])
        features, logits = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return features, logits.argmax(axis=1)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the parameters to an npz file, atomically."""
        leaves = jax.tree_util.tree_flatten_with_path(self.params)[0]
        with files.writing(path) as file:
            np.savez(file, **{path_name(where): np.asarray(leaf) for where, leaf in leaves})

    @classmethod
    def load(cls, path: str | os.PathLike, clip_shape: tuple[int, int, int, int], classes: int) -> "ClipProbe":
        """Reads what `save` wrote; `InputError` if the file is damaged."""
        shapes = nnx.to_pure_dict(nnx.state(_abstract(clip_shape, classes), nnx.Param))
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        expected = {path_name(where): npz.Array(np.float32, leaf.shape) for where, leaf in leaves}
        arrays = npz.read(path, expected, fix="delete it, and run the experiment again")
        return cls(
            clip_shape, jax.tree_util.tree_unflatten(structure, [arrays[path_name(where)] for where, _ in leaves])
        )


@rng.pinned()
def train_probe(spec: str, clip: ClipSpec, classes: int, *, steps: int) -> ClipProbe:
    """Trains a classifier on real clips, sharp and blurred, so that it also reads blurred samples.

    Args:
      spec: data set of labeled clips.
      clip: size of the clips.
      classes: number of classes.
      steps: training steps, of 16 clips each.
    """

    def make(key):
        return nnx.to_pure_dict(nnx.state(Classifier(clip.shape, classes, rngs=nnx.Rngs(key)), nnx.Param))

    graphdef = nnx.graphdef(_abstract(clip.shape, classes))
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=1e-3)

    @jax.jit
    def step(params, state, video, label, key):
        video = _blurred(as_float_video(video), key)

        def objective(params):
            logits = nnx.merge(graphdef, params)(video)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(make)(rng.key(0))
    state = optimizer.init(params)
    with (
        data.train_batches(spec, clip, batch_size=BATCH, seed=0) as batches,
        Progress(steps, description="probe") as progress,
    ):
        for number in range(steps):
            batch = next(batches)
            key = jax.random.fold_in(rng.key(1), number)
            params, state, loss = step(params, state, batch["video"], jnp.asarray(batch["label"]), key)
            progress.update(loss=float(loss))
    return ClipProbe(clip.shape, jax.device_get(params))


def _blurred(video: jax.Array, key: jax.Array) -> jax.Array:
    """Clips [B, T, H, W, C] in [0, 1], each blurred by a random factor of `BLURS`, with some noise."""
    factor_key, noise_key = jax.random.split(key)
    *_, height, width, _ = video.shape
    versions = []
    for factor in BLURS:
        small = (*video.shape[:2], max(height // factor, 1), max(width // factor, 1), video.shape[-1])
        versions.append(jax.image.resize(jax.image.resize(video, small, "linear"), video.shape, "linear"))
    chosen = jax.random.randint(factor_key, (len(video), 1, 1, 1, 1), 0, len(BLURS))
    video = jnp.take_along_axis(jnp.stack(versions), chosen[None], axis=0)[0]
    return jnp.clip(video + NOISE * jax.random.normal(noise_key, video.shape), 0.0, 1.0)


def _abstract(clip_shape: tuple[int, int, int, int], classes: int) -> Classifier:
    """The classifier with shapes in place of parameters."""
    return nnx.eval_shape(lambda: Classifier(clip_shape, classes, rngs=nnx.Rngs(0)))


def probe_distance(features: np.ndarray, real: np.ndarray) -> float:
    """Frechet distance between features of samples [M, D] and of real clips [M', D]."""
    return frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(real))
