"""Workdirs and checkpoints: the only module that knows Orbax.

A workdir holds `config.json` and `checkpoints/STEP/`. A checkpoint has one item per concern: `params`, `ema`,
`optimizer`, and `metadata` (JSON: the recipe, the step, code counts), so that it can be used without its workdir. An
imported directory is such a checkpoint without an optimiser.

A checkpoint appears under its name when all of it is written, `checksums.json` included, so a killed run leaves whole
ones only; what happens to them later shows when they are read.
"""

import contextlib
import dataclasses
import json
import logging
import operator
import os
import pathlib
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from larp_jax import errors, files
from larp_jax.config import parse_recipe
from larp_jax.errors import InputError
from larp_jax.state import TrainState

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums.json"

logger = logging.getLogger(__name__)
# Orbax reports every save at INFO, restoring at WARNING, and what it raises with its traceback at ERROR.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class SaveFailed(RuntimeError):
    """The last state of a run is on no disk."""


class CheckpointManager:
    """Saves and restores a run's `TrainState`.

    A checkpoint that cannot be written (a full disk) does not stop the run: it is logged, and the next one is tried.

    Args:
      workdir: the run's folder.
      keep: newest checkpoints to keep.
      best_metric: name of the evaluation metric whose best checkpoint is kept beside them; higher is better.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int, best_metric: str):
        self._root = pathlib.Path(workdir).absolute() / CHECKPOINTS
        self._keep, self._best_metric = keep, best_metric
        self._saving: int | None = None  # the step that is being written
        self._unsaved = ""  # why the last one could not be written
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        keeping = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keeping.AnyPreservationPolicy(
                [
                    keeping.LatestN(self._keep),
                    keeping.BestN(
                        get_metric_fn=lambda metrics: metrics[self._best_metric],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,  # what a killed run left half written
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        return ocp.CheckpointManager(self._root, options=options)

    def _write_checksums(self) -> None:
        """Adds the checksums to what is all written, but does not bear its name yet."""
        if jax.process_index() == 0:
            for directory in self._root.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                _write_digests(directory)

    def save(self, state: TrainState, metadata: Mapping, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving; returns when the arrays are copied, the writing goes on in the background."""
        self.wait()
        self._saving = int(state.step)
        with self._may_fail():
            self._save(state, metadata, metrics)

    def _save(self, state, metadata, metrics) -> None:
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

    def restore_newest(self, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict] | None:
        """The newest state that can be read, and its metadata; None where there is no checkpoint.

        Damaged ones that are newer are renamed, as the run is about to make them again.

        Raises:
          InputError: there are checkpoints, and none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = _everywhere(damage(self._root / str(step)) if jax.process_index() == 0 else "")
            if not reason:
                try:
                    found = self.restore(shapes, shardings, step), self.metadata(step)
                except Exception as error:  # damage shows in many ways
                    if jax.process_count() > 1:  # the others may have succeeded
                        raise
                    reason = errors.reason(error)
                else:
                    self._put_aside(damaged, step)
                    return found
            damaged[step] = reason
        if damaged:
            raise InputError(
                f"no checkpoint in {self._root} can be read (the newest, {max(damaged)}: {damaged[max(damaged)]}); put"
                " back a copy, or choose another --workdir to start anew"
            )
        return None

    def _put_aside(self, damaged: Mapping[int, str], step: int) -> None:
        for newer, reason in damaged.items():
            logger.warning(
                "checkpoint %d is damaged (%s), continuing from %d; it is now %d.damaged", newer, reason, step, newer
            )
            if jax.process_index() == 0:
                (self._root / str(newer)).rename(self._root / _free_name(self._root, f"{newer}.damaged"))
        if damaged:
            _everywhere("")  # all wait for the first
            self._manager.reload()

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

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
        """Returns when everything is on disk that there is room for."""
        with self._may_fail():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._saving is not None:
                self._saving, self._unsaved = None, ""

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """A block that writes: what it raises is logged."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1:  # the others may have succeeded, and wait for this one
                raise
            self._unsaved = f"checkpoint {self._saving} cannot be written in {self._root} ({errors.reason(error)})"
            logger.warning("%s; the run goes on and will try again", self._unsaved)
            self._saving = None
            with contextlib.suppress(Exception):
                self._manager.close()
            self._remove_partial()
            self._manager = self._open()

    def _remove_partial(self) -> None:
        """Removes what a failed save left; threads of it may still be writing there for a moment."""
        for _ in range(20):
            for directory in self._root.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(directory, ignore_errors=True)
            time.sleep(0.1)
            if not any(self._root.glob("*.orbax-checkpoint-tmp*")):
                break

    def close(self) -> None:
        """Waits for the writing and lets go."""
        self.wait()
        self._manager.close()

    def check_saved(self) -> None:
        """`SaveFailed` if what was saved last could not be written."""
        if self._unsaved:
            newest = self._manager.latest_step()
            kept = "there is none before" if newest is None else f"the newest is {newest}"
            raise SaveFailed(f"{self._unsaved}; {kept}. Make room, and the same command continues")


def _everywhere(text: str) -> str:
    """The text that the first process has, on all of them."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    padded = np.frombuffer(text.encode()[:256].ljust(256, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode(errors="ignore")


def _free_name(folder: pathlib.Path, name: str) -> str:
    number = 1
    while (folder / (candidate := name if number == 1 else f"{name}.{number}")).exists():
        number += 1
    return candidate


def _digests(directory: pathlib.Path, items: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file of these items of a checkpoint, of all without, by path."""
    digests = {}
    for path in sorted(directory.glob("*/**/*")):
        if path.is_file() and (not items or path.relative_to(directory).parts[0] in items):
            digests[path.relative_to(directory).as_posix()] = files.digest(path)
    return digests


def _write_digests(directory: pathlib.Path) -> None:
    files.write_json(directory / CHECKSUMS, _digests(directory))


def damage(directory: pathlib.Path, items: Collection[str] = ()) -> str:
    """What is wrong with these items of a checkpoint (all without) by their checksums; empty if nothing is known."""
    path = directory / CHECKSUMS
    if not path.exists():  # of an earlier version
        return ""
    try:
        expected = json.loads(path.read_bytes())
        if not isinstance(expected, dict):
            raise ValueError("no names")
        found = _digests(directory, items)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{CHECKSUMS} cannot be read: {errors.reason(error)}"
    for name, digest in expected.items():
        if items and name.partition("/")[0] not in items:
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return ""


@contextlib.contextmanager
def claim(workdir: str | os.PathLike) -> Iterator[None]:
    """A block in which this run alone writes to a workdir, which is made if missing; its first process claims it.

    Raises:
      InputError: another process has it, or it cannot be written.
    """
    if jax.process_index():
        yield
        return
    with files.claim(workdir, "--workdir"):
        yield


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
      class_names: of a generator, the classes of its training data in the order of their labels; empty where unknown.
    """

    path: pathlib.Path
    recipe: Any
    params: dict
    step: int
    code_counts: np.ndarray | None
    mean_clip: np.ndarray | None
    tokenizer_fingerprint: str | None = None
    class_counts: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a directory is a checkpoint itself (as opposed to a workdir)."""
    return (path / "params").is_dir() and (path / "metadata").is_dir()


def newest(path: str | os.PathLike) -> pathlib.Path | None:
    """The checkpoint that a path names: itself, or the newest of a workdir; None where there is none."""
    path = files.local_path(path, "checkpoint")
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
    item = "ema" if weights == "ema" and (directory / "ema").is_dir() else "params"
    if reason := damage(directory, ("metadata", item)):
        raise InputError(f"checkpoint {directory} is damaged ({reason}); use another step")
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            metadata = reader.restore(directory / "metadata")
        if not isinstance(metadata, dict) or "config" not in metadata:
            raise ValueError("its metadata holds no config")
        counts, class_counts = (
            None if metadata.get(name) is None else np.asarray(metadata[name], np.int64)
            for name in ("code_counts", "class_counts")
        )
        class_names = tuple(metadata.get("class_names") or ())
        if not all(isinstance(name, str) for name in class_names):
            raise ValueError("its class_names are no names")
        step = operator.index(metadata.get("step", 0))
        with ocp.PyTreeCheckpointer() as reader:
            arrays = reader.metadata(directory / item).item_metadata
            if arrays is None:
                raise ValueError(f"the description of {item} is missing")
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays.tree)
            params = reader.restore(directory / item, restore_args=as_numpy)
    except Exception as error:  # damage shows in many ways
        raise InputError(f"checkpoint {directory} cannot be read ({errors.reason(error)}); use another step") from error
    try:
        recipe = parse_recipe(metadata["config"])
    except InputError as error:
        raise InputError(f"checkpoint {directory} has settings that this version does not know: {error}") from error
    in_workdir = directory.parent.name == CHECKPOINTS
    mean_clip = directory.parent.parent / MEAN_CLIP
    return Checkpoint(
        path=directory,
        recipe=recipe,
        params=params,
        step=step,
        code_counts=counts,
        mean_clip=read_mean_clip(mean_clip) if in_workdir and mean_clip.exists() else None,
        tokenizer_fingerprint=metadata.get("tokenizer_fingerprint"),
        class_counts=class_counts,
        class_names=class_names,
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
        raise InputError(f"checkpoint {directory} cannot be read ({errors.reason(error)}); use another step") from error


def write_imported(directory: str | os.PathLike, recipe: Mapping, params: dict) -> None:
    """Writes parameters from elsewhere as a checkpoint of their own (step 0, no optimiser); refuses to overwrite.

    Raises:
      InputError: the directory exists and is not empty.
    """
    args = ocp.args
    with files.new_folder(directory) as folder, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            folder / "0",
            args=args.Composite(
                params=args.StandardSave(params), metadata=args.JsonSave({"config": dict(recipe), "step": 0})
            ),
        )
        for path in (folder / "0").iterdir():
            path.rename(folder / path.name)
        (folder / "0").rmdir()
        _write_digests(folder)


MEAN_CLIP = "mean_clip.npz"


def write_mean_clip(workdir: str | os.PathLike, clip: np.ndarray) -> None:
    """Keeps the mean training clip, float [T, H, W, C]: what a collapsed tokenizer gives, as a baseline."""
    path = pathlib.Path(workdir) / MEAN_CLIP
    with files.writing(path) as file:  # another process may be about to read it
        np.savez_compressed(file, mean_clip=clip.astype(np.float32))


def read_mean_clip(path: str | os.PathLike) -> np.ndarray:
    """What `write_mean_clip` wrote, float32.

    Raises:
      InputError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["mean_clip"]
    except Exception as error:  # whatever a broken archive provokes in zipfile, zlib and NumPy
        raise InputError(f"{path} is damaged ({type(error).__name__}); remove it, training makes it again") from error


def write_config(workdir: str | os.PathLike, recipe: Mapping) -> None:
    """Writes `config.json`, whole or not at all."""
    files.write_json(pathlib.Path(workdir) / CONFIG, recipe, indent=2)


def read_config(workdir: str | os.PathLike) -> dict | None:
    """What `config.json` holds, None without one."""
    path = pathlib.Path(workdir) / CONFIG
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        return values
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no recipe ({error}); restore it or choose another --workdir") from error
