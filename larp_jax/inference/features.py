"""Features of a frozen network for the clips of a data set; `larp_jax.data.features` defines the format."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax import data, files
from larp_jax.config import MeshConfig, TokenizerRecipe
from larp_jax.data import features
from larp_jax.data.clips import spread_starts
from larp_jax.data.pipeline import choose_windows
from larp_jax.errors import InputError
from larp_jax.inference.batches import BatchFolder
from larp_jax.models.alignment import resampled
from larp_jax.models.pixels import as_float_video
from larp_jax.models.teachers import Teacher
from larp_jax.runtime import sharding
from larp_jax.runtime.progress import Progress
from larp_jax.weights import networks

logger = logging.getLogger(__name__)

SHARD_WINDOWS = 64  # what an interrupted call may lose


def write_features(
    recipe: TokenizerRecipe,
    output: str | os.PathLike,
    *,
    teacher: str | None = None,
    spec: str | None = None,
    windows: int = 0,
    flips: bool = False,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Writes clips of a data set together with the features of a frozen network, for alignment.

    Features are those that a step of the recipe computes for such a clip, as float16. An interrupted call continues;
    each host computes its share of the shards.

    Args:
      recipe: gives clips, their sampling, the grid of the decoder's patches, and the precision.
      output: folder to write to, created if missing.
      teacher: name or path of the network; by default `loss.alignment` of the recipe.
      spec: data set, of the split `train` by default; by default `data.train` of the recipe.
      windows: at most this many full windows of each video, spread evenly over it; 0 for consecutive windows.
      flips: whether to add every window mirrored left to right.
      batch_size: clips at a time on this host.

    Returns:
      The manifest, as described in `larp_jax.data.features`; empty on all hosts but the first.

    Raises:
      InputError: the network cannot be read or does not take such clips, no clip can be read, or the folder contains
        something else.
    """
    teacher, spec, model = teacher or recipe.loss.alignment, spec or recipe.data.train, recipe.model
    output = files.check_folder(files.local_path(output, "--output"))
    network = _load(teacher, model.clip_shape, recipe.precision)
    clip = data.ClipSpec.of(model.clip_shape, flip=False, fps=recipe.data.fps, stride=recipe.data.stride)
    source = data.open_source(spec, clip)
    chosen = _windows(source, clip, windows)
    name, path, _ = networks.locate_teacher(teacher)
    described = {
        "teacher": {"name": name, "config": dataclasses.asdict(network.config), "sha256": files.digest(path)},
        "precision": recipe.precision,
        "clip": list(clip.shape),
        "features": [*model.decoder_grid, network.dim],
        "data": spec,
        "sampling": clip.sampling,
        "windows": windows,
        "flips": flips,
    }
    described = json.loads(json.dumps(described))  # tuples become lists, as in the settings of an earlier call
    identity = hashlib.sha256(repr([(source.name(video), start) for video, start in chosen]).encode("utf-8", "replace"))
    settings = {"command": "features", **described, "clips": f"{len(chosen)} of {identity.hexdigest()[:16]}"}
    count = -(-len(chosen) // SHARD_WINDOWS)
    dtype, mirrored = features.record(described), (False, True) if flips else (False,)
    see, batch_size = _on_devices(network, model.decoder_grid, batch_size)
    with BatchFolder(output, settings, count, content="features") as run:
        with Progress(len(chosen) * len(mirrored), description="features", unit="clip") as progress:
            for number in run.mine:
                part = chosen[number * SHARD_WINDOWS :][:SHARD_WINDOWS]
                shard = run.path / features.shard_name(number, count)
                if not _is_whole(shard, dtype):
                    rows = _rows(see, source, clip, part, mirrored, dtype, batch_size)
                    rows["window"] += number * SHARD_WINDOWS
                    features.write_shard(shard, rows)
                progress.update(len(part) * len(mirrored))
        manifest = {}
        if run.is_last():
            manifest = features.new_manifest(**described, **_contents(run.path, count, dtype, source, chosen))
            if not manifest["rows"]:
                raise InputError(f"{spec}: nothing in it can be read")
            features.write_manifest(run.path, manifest)
    return manifest


def _load(teacher: str, clip_shape: tuple[int, ...], precision: str) -> Teacher:
    try:
        network = networks.load_teacher(teacher, dtype=jnp.dtype(precision))
        network.grid(clip_shape[:3])
    except InputError as error:
        raise InputError(f"--teacher {teacher}: {error}") from error
    return network


def _windows(source: data.Source, clip: data.ClipSpec, count: int) -> list[tuple[int, int]]:
    """(video, first frame) of each window."""
    if not count:
        return choose_windows(source, clip)
    starts = lambda video: spread_starts(source.frames(video), clip.frames, count)  # noqa: E731
    return [(video, start) for video in range(len(source)) for start in starts(video)]


def _on_devices(network: Teacher, grid: tuple[int, int, int], batch_size: int) -> tuple[Callable, int]:
    """A function from clips, uint8, to their features on the grid, float16; and how many clips it needs at a time."""
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    graphdef, params = nnx.split(network)
    params = jax.device_put(params, sharding.replicated(mesh))

    @jax.jit
    def features_of(params, video):
        return resampled(nnx.merge(graphdef, params)(as_float_video(video)), grid).astype(jnp.float16)

    split = sharding.batch_sharding(mesh)
    see = lambda video: np.asarray(features_of(params, jax.device_put(video, split)))  # noqa: E731
    return see, -(-batch_size // mesh.size) * mesh.size


def _rows(
    see: Callable,
    source: data.Source,
    clip: data.ClipSpec,
    windows: list[tuple[int, int]],
    mirrored: tuple[bool, ...],
    dtype: np.dtype,
    batch_size: int,
) -> np.ndarray:
    """The rows of those windows that can be read; `window` counts from 0."""
    parts = [np.zeros(0, dtype)]
    with data.eval_batches(source, clip, batch_size=batch_size, windows=windows) as batches:
        numbered = zip(itertools.count(0, batch_size), batches)
        for start, batch, flip in ((start, batch, flip) for start, batch in numbered for flip in mirrored):
            real = np.flatnonzero(batch["mask"])
            video = batch["video"][:, :, :, ::-1] if flip else batch["video"]
            part = np.zeros(len(real), dtype)
            part["video"], part["features"] = video[real], see(video)[real]
            part["window"], part["flip"] = start + real, flip
            if not np.isfinite(part["features"]).all():
                raise InputError(
                    f"features of {batch['name'][real[0]]} or a clip beside it exceed float16, in which they are stored"
                    " (65504); align with clips instead of features: for this teacher"
                )
            parts.append(part)
    return np.concatenate(parts)


def _is_whole(path: pathlib.Path, dtype: np.dtype) -> bool:
    """Whether an earlier call wrote this shard."""
    if not path.exists():
        return False
    try:
        features.shard_header(path, dtype)
    except InputError as error:
        logger.warning("%s; computing it again", str(error).partition(";")[0])
        return False
    return True


def _contents(
    folder: pathlib.Path, count: int, dtype: np.dtype, source: data.Source, windows: list[tuple[int, int]]
) -> dict[str, Any]:
    """Shards and rows of the manifest of a folder whose shards are complete."""
    names = [features.shard_name(number, count) for number in range(count)]
    shards, rows = [], []
    for name in names:
        shards.append({"file": name, "rows": features.shard_header(folder / name, dtype)[0]})
        for window, flip in features.windows_of(folder / name, dtype, len(windows)):
            video, start = windows[window]
            rows.append({"video": video, "source": source.name(video), "start": start, "flip": flip})
    return {"shards": shards, "rows": rows}
