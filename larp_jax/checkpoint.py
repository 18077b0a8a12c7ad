"""Workdirs and checkpoints: the only module that knows Orbax.

A workdir holds `config.json` and `checkpoints/STEP/`. A checkpoint has one item per concern: `params`, `ema`,
`optimizer`, and `metadata` (JSON: the recipe, the step, code counts), so that it can be used without its workdir. An
imported directory is such a checkpoint without an optimiser.
"""

import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from larp_jax.config import parse_recipe
from larp_jax.errors import InputError
from larp_jax.state import TrainState

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save at INFO, and restoring at WARNING


class CheckpointManager:
    """Saves and restores a run's `TrainState`.

    Args:
      workdir: the run's folder.
      keep: newest checkpoints to keep.
      best_metric: name of the evaluation metric whose best checkpoint is kept beside them; higher is better.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int, best_metric: str):
        keeping = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keeping.AnyPreservationPolicy(
                [
                    keeping.LatestN(keep),
                    keeping.BestN(
                        get_metric_fn=lambda metrics: metrics[best_metric],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,  # what a killed run left half written
        )
        root = pathlib.Path(workdir).absolute() / CHECKPOINTS
        self._manager = ocp.CheckpointManager(root, options=options)
        self._best_metric = best_metric

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: Mapping, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving; returns when the arrays are copied, the writing goes on in the background."""
        args = ocp.args
        items = {
            "params": args.StandardSave(state.params),
            "optimizer": args.StandardSave({"step": state.step, "state": state.opt_state}),
            "metadata": args.JsonSave(dict(metadata)),
        }
        if state.ema:
            items["ema"] = args.StandardSave(state.ema)
        best = {self._best_metric: metrics[self._best_metric]} if metrics and self._best_metric in metrics else None
        self._manager.save(int(state.step), args=args.Composite(**items), metrics=best)

    def restore(self, shapes: TrainState, shardings: TrainState, step: int) -> TrainState:
        """The state of a checkpoint, placed as `shardings` say, whatever mesh wrote it."""
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        args = ocp.args
        items = {
            "params": args.StandardRestore(target.params),
            "optimizer": args.StandardRestore({"step": target.step, "state": target.opt_state}),
        }
        if target.ema:
            items["ema"] = args.StandardRestore(target.ema)
        restored = self._manager.restore(step, args=args.Composite(**items))
        optimizer = restored["optimizer"]
        return TrainState(
            optimizer["step"], restored["params"], optimizer["state"], restored["ema"] if target.ema else {}
        )

    def wait(self) -> None:
        """Returns when everything is on disk; raises what the writing raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the writing and lets go."""
        self._manager.close()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read for use rather than for training on.

    Attributes:
      path: where it lies.
      recipe: the run's configuration.
      params: parameters by module as NumPy arrays, the moving average where one was kept.
      step: optimiser steps done; 0 where unknown.
      code_counts: [K] int64, how often the last evaluation used each code; None where unknown.
      mean_clip: [T, H, W, C] float32 in [0, 1], the mean of training clips; None where unknown.
      tokenizer_fingerprint: of a generator, the tokenizer whose codes it was trained on; None where unknown.
      class_counts: [classes] int64, of a generator, training clips of each class; None where unknown.
    """

    path: pathlib.Path
    recipe: Any
    params: dict
    step: int
    code_counts: np.ndarray | None
    mean_clip: np.ndarray | None
    tokenizer_fingerprint: str | None = None
    class_counts: np.ndarray | None = None


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a directory is a checkpoint itself (as opposed to a workdir)."""
    return (path / "params").is_dir() and (path / "metadata").is_dir()


def newest(path: str | os.PathLike) -> pathlib.Path | None:
    """The checkpoint that a path names: itself, or the newest of a workdir; None where there is none."""
    path = pathlib.Path(path)
    if is_checkpoint(path):
        return path
    steps = [p for p in (path / CHECKPOINTS).glob("*") if p.name.isdigit() and is_checkpoint(p)]
    return max(steps, key=lambda p: int(p.name), default=None)


def load(path: str | os.PathLike, *, weights: str = "ema") -> Checkpoint:
    """Reads the checkpoint that a path names: a workdir (the newest), a step directory or an imported directory.

    Args:
      path: the directory.
      weights: `ema` for the moving average where one was kept, `raw` for the parameters themselves.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    directory = newest(path)
    if directory is None:
        raise InputError(f"no checkpoint in {path}: give a workdir, one of its checkpoints, or an imported directory")
    directory = directory.absolute()
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            metadata = reader.restore(directory / "metadata")
        item = "ema" if weights == "ema" and (directory / "ema").is_dir() else "params"
        with ocp.PyTreeCheckpointer() as reader:
            arrays = reader.metadata(directory / item).item_metadata
            if arrays is None:
                raise ValueError(f"the description of {item} is missing")
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays.tree)
            params = reader.restore(directory / item, restore_args=as_numpy)
    except Exception as error:  # damage shows in many ways
        raise InputError(f"checkpoint {directory} cannot be read ({_first_line(error)}); use another step") from error
    try:
        recipe = parse_recipe(metadata["config"])
    except InputError as error:
        raise InputError(f"checkpoint {directory} has settings that this version does not know: {error}") from error
    counts, class_counts = (
        None if metadata.get(name) is None else np.asarray(metadata[name], np.int64)
        for name in ("code_counts", "class_counts")
    )
    in_workdir = directory.parent.name == CHECKPOINTS
    mean_clip = directory.parent.parent / MEAN_CLIP
    return Checkpoint(
        path=directory,
        recipe=recipe,
        params=params,
        step=metadata.get("step", 0),
        code_counts=counts,
        mean_clip=read_mean_clip(mean_clip) if in_workdir and mean_clip.exists() else None,
        tokenizer_fingerprint=metadata.get("tokenizer_fingerprint"),
        class_counts=class_counts,
    )


def read_metadata(path: str | os.PathLike) -> dict[str, Any] | None:
    """What the checkpoint that a path names says about itself, without its arrays; None where there is none.

    Raises:
      InputError: it cannot be read.
    """
    directory = newest(path)
    if directory is None:
        return None
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore(directory.absolute() / "metadata")
    except Exception as error:  # damage shows in many ways
        raise InputError(f"checkpoint {directory} cannot be read ({_first_line(error)}); use another step") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_imported(directory: str | os.PathLike, recipe: Mapping, params: dict) -> None:
    """Writes parameters from elsewhere as a checkpoint of their own (step 0, no optimiser); refuses to overwrite.

    Raises:
      InputError: the directory exists and is not empty.
    """
    path = pathlib.Path(directory).absolute()
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{directory} exists and is not empty; name another --output")
    args = ocp.args
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            path,
            args=args.Composite(
                params=args.StandardSave(params), metadata=args.JsonSave({"config": dict(recipe), "step": 0})
            ),
            force=True,
        )


MEAN_CLIP = "mean_clip.npz"


def write_mean_clip(workdir: str | os.PathLike, clip: np.ndarray) -> None:
    """Keeps the mean training clip, float [T, H, W, C]: what a collapsed tokenizer gives, as a baseline."""
    path = pathlib.Path(workdir) / MEAN_CLIP
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, mean_clip=clip.astype(np.float32))
    os.replace(temporary, path)  # another process may be about to read it


def read_mean_clip(path: str | os.PathLike) -> np.ndarray:
    """What `write_mean_clip` wrote, float32."""
    with np.load(path) as file:
        return file["mean_clip"]


def write_config(workdir: str | os.PathLike, recipe: Mapping) -> None:
    """Writes `config.json`, whole or not at all."""
    path = pathlib.Path(workdir) / CONFIG
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(recipe, indent=2) + "\n")
    os.replace(temporary, path)


def read_config(workdir: str | os.PathLike) -> dict | None:
    """What `config.json` holds, None without one."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); restore it or choose another --workdir") from error
