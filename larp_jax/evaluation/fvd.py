"""Frechet video distance (Unterthiner et al. 2018, arXiv 1812.01717) between I3D features of real and generated videos.

The protocols are those of LARP (arXiv 2410.21264, section 4.1) and the released code.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax import files
from larp_jax.config import MeshConfig
from larp_jax.errors import InputError
from larp_jax.evaluation.description import Description
from larp_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from larp_jax.evaluation.protocols import ClipSet
from larp_jax.models.pixels import as_float_video
from larp_jax.runtime import sharding
from larp_jax.runtime.progress import Progress
from larp_jax.version import __version__

logger = logging.getLogger(__name__)


class VideoFeatures:
    """The features that FVD compares: the logits of I3D (Carreira and Zisserman 2017, arXiv 1705.07750).

    They are computed one clip at a time on each device.

    Args:
      i3d: `larp_jax.models.i3d.I3d` with its trained weights.
      identity: identifies the weights, as `larp_jax.weights.networks.identify` does.
      resolution: side of the squares that frames are resized to first (bilinear, antialiased); 0 for no resizing.

    Attributes:
      i3d: as given.
      dimension: number of features.
    """

    def __init__(self, i3d, identity: dict[str, Any], *, resolution: int = 0):
        self.i3d, self._identity, self._resolution = i3d, identity, resolution
        frames = jax.ShapeDtypeStruct((1, 16, 32, 32, 3), jnp.float32)  # the size does not matter
        self.dimension = jax.eval_shape(lambda i3d, video: i3d.logits(video), i3d, frames).shape[-1]

    def describe(self) -> dict[str, Any]:
        """What to record with the scores, ready for JSON."""
        return {"i3d": self._identity, "fvd_resolution": self._resolution or None}

    def of(self, i3d, video: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
        """Features [B, D] of videos [B, T, H, W, 3] in [0, 1], B split over the mesh; for use under `jax.jit`."""

        def of_clip(i3d, clip):
            if self._resolution:
                shape = (len(clip), self._resolution, self._resolution, clip.shape[-1])
                clip = jax.image.resize(clip, shape, "bilinear", antialias=True)
            with jax.default_matmul_precision("float32"):
                return i3d.logits(clip[None])[0]

        return sharding.clip_by_clip(of_clip, mesh)(i3d, video)

    def statistics(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], *, batch_size: int) -> FeatureStatistics:
        """Statistics over all processes, which may have different numbers of videos.

        Args:
          batches: videos of this process, [b, T, H, W, 3], uint8 or floats in [0, 1], with masks [b] (1: real, 0: left
            out); b may vary.
          batch_size: videos computed at a time; rounded up to a multiple of the devices of this process.

        Raises:
          InputError: a feature is NaN or infinite, or I3D does not accept such videos.
        """
        total = FeatureStatistics.empty(self.dimension)
        mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
        size = -(-batch_size // mesh.size) * mesh.size
        with jax.set_mesh(mesh):
            i3d = sharding.replicate(self.i3d, mesh)
            for video, mask in _of_size(batches, size):
                features = self._compute(i3d, sharding.to_mesh({"video": video}, mesh)["video"], mesh)
                total = total.merge(FeatureStatistics.of(np.asarray(features), mask))
        return _over_processes(total)

    @functools.cached_property
    def _compute(self):
        def compute(i3d, video, mesh):
            return self.of(i3d, as_float_video(video), mesh)

        return jax.jit(compute, static_argnums=2)


def real_statistics(
    features: VideoFeatures, clips: ClipSet, *, batch_size: int, progress: bool = False
) -> FeatureStatistics:
    """Statistics of the clips of a data set, cached in `cache_folder()`.

    The key of the cache covers the bytes of the videos, the windows, the weights, and the versions of this package and
    the decoder, so any change leads to a new computation. Processes use the cache if all of them have the entry.

    Args:
      features: computes the features.
      clips: the real clips.
      batch_size: clips at a time, over all processes.
      progress: whether to show a bar.

    Raises:
      InputError: as for `VideoFeatures.statistics`, or no clip could be read.
    """
    key = features.describe() | {
        "clips": clips.digest(),
        "larp_jax": __version__,
        "av": importlib.metadata.version("av"),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / f"i3d-{name[:32]}.npz"
    found = _cached(path, key)
    if _all_processes(found is not None):
        logger.info("I3D features of %d real clips: taken from %s", found.count, path)
        return found
    count, index = jax.process_count(), jax.process_index()
    with clips.batches(batch_size, process_index=index, process_count=count) as batches:
        bar = Progress(-(-len(clips) // batch_size), description="real clips", unit="batch") if progress else None
        with bar or contextlib.nullcontext():
            pairs = ((batch["video"], batch["mask"]) for batch in batches)
            statistics = features.statistics(_counted(pairs, bar), batch_size=batch_size // count)
    if not statistics.count:
        raise InputError("none of the real clips could be read; see the log for the reasons")
    try:
        statistics.save(path, key)
    except (OSError, InputError) as error:
        logger.warning("cannot cache the I3D features of the real clips: %s", error)
    return statistics


def cache_folder() -> pathlib.Path:
    """Where statistics of real clips are cached: $XDG_CACHE_HOME/larp_jax, or ~/.cache/larp_jax."""
    return files.local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "larp_jax"


def distance(real: FeatureStatistics, generated: FeatureStatistics, *, covariance: str) -> float:
    """The Frechet distance, with a warning if there are fewer clips than features.

    Raises:
      InputError: there are too few clips for the covariance.
    """
    few = min(real.count, generated.count)
    if few <= len(real.mean):
        logger.warning(
            "the Frechet distance of %d clips is biased upward, because there are fewer clips than feature dimensions"
            " (%d): compare it only with distances of as many clips",
            few,
            len(real.mean),
        )
    return frechet_distance(real, generated, covariance=covariance)


class FvdEvaluator(Description):
    """Frechet video distance between generated videos and the clips of a data set.

    Args:
      i3d: `larp_jax.models.i3d.I3d` with its trained weights.
      identity: identifies the weights, as `larp_jax.weights.networks.identify` does.
      clips: the real clips; their protocol fixes the covariance and the resolution.
      batch_size: videos at a time.
      progress: whether to show a bar while the real clips are read.
    """

    name = "fvd"
    definitions: ClassVar = {
        "fvd": "Frechet distance between I3D's logits of the clips and of as many sampled videos, clamped and not"
        " rounded; a predicted video includes its given frames, as the tokenizer decodes them; frames resized to 224"
        " (bilinear, not antialiased)"
    }
    network = "i3d"

    def __init__(
        self, i3d, identity: dict[str, Any], clips: ClipSet, *, batch_size: int, progress: bool = False
    ):
        self._features = VideoFeatures(i3d, identity, resolution=clips.protocol.fvd_resolution)
        self._clips = clips
        self._batch_size, self._progress = batch_size, progress

    @functools.cached_property
    def real(self) -> FeatureStatistics:
        """Statistics of the real clips, computed or read from the cache at first use."""
        return real_statistics(self._features, self._clips, batch_size=self._batch_size, progress=self._progress)

    def run(self, videos: Iterable[np.ndarray]) -> tuple[dict[str, float], dict[str, Any]]:
        """Evaluates. The real clips are read first, so that their errors appear before any video is generated.

        Args:
          videos: batches [B, T, H, W, 3] of the videos generated by this process, uint8 or floats in [0, 1]; B may
            vary.

        Returns:
          Scalars by name (`fvd`), and their protocol, ready for JSON.

        Raises:
          InputError: there are no videos, I3D does not accept them, or a feature is NaN or infinite.
        """
        real = self.real
        pairs = ((video, np.ones(len(video))) for video in videos)
        generated = self._features.statistics(pairs, batch_size=-(-self._batch_size // jax.process_count()))
        if generated.count != real.count:
            logger.warning("%d videos are compared with %d real clips; generate as many", generated.count, real.count)
        covariance = self._clips.protocol.covariance
        protocol = self._clips.describe() | self._features.describe()
        protocol |= {"covariance": covariance, "clips": real.count, "made": generated.count}
        return {"fvd": distance(real, generated, covariance=covariance)}, protocol


def _cached(path: pathlib.Path, key: dict[str, Any]) -> FeatureStatistics | None:
    """The statistics in the file; None if it is missing, invalid or of another key."""
    if not path.exists():
        return None
    try:
        statistics, metadata = FeatureStatistics.load(path)
    except InputError as error:
        logger.warning("computing the statistics of the real clips again: %s", error)
        return None
    return statistics if metadata == key else None


def _counted(items: Iterable, bar: Progress | None) -> Iterator:
    for item in items:
        yield item
        if bar:
            bar.update()


def _of_size(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches cut or padded to one size, so that only one function is compiled."""
    for video, mask in batches:
        video = np.asarray(video)
        for start in range(0, len(video), size):
            piece, real = video[start : start + size], np.asarray(mask[start : start + size])
            missing = size - len(piece)
            filled = np.concatenate([piece, np.zeros((missing, *piece.shape[1:]), piece.dtype)]) if missing else piece
            yield filled, np.concatenate([real, np.zeros(missing)])


def _all_processes(condition: bool) -> bool:
    if jax.process_count() == 1:
        return condition
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(condition)).all())


def _over_processes(statistics: FeatureStatistics) -> FeatureStatistics:
    """The statistics of all processes merged."""
    if jax.process_count() == 1:
        return statistics
    from jax.experimental import multihost_utils

    dimension = len(statistics.mean)
    packed = np.concatenate([[statistics.count], statistics.mean, statistics.scatter.ravel()])
    # as integers, because float64 would arrive as float32
    gathered = multihost_utils.process_allgather(packed.view(np.uint32))
    total = FeatureStatistics.empty(dimension)
    for row in np.ascontiguousarray(gathered).view(np.float64):
        scatter = row[1 + dimension :].reshape(dimension, dimension)
        total = total.merge(FeatureStatistics(int(row[0]), row[1 : 1 + dimension], scatter))
    return total
