"""Workdirs and checkpoints: the only module that uses Orbax.

A workdir contains `config.json` and `checkpoints/STEP/`. A checkpoint has the items `params`, `ema`, `optimizer` and
`metadata` (JSON: the recipe, the step, code counts), and can be used without its workdir. An imported directory is a
checkpoint without an optimizer.

A checkpoint gets its name after everything in it is written, including `checksums.json`, so a killed run leaves only
complete checkpoints. In a bucket, which has no renaming, `commit_success.txt` is written last, and folders without it
do not count. Later damage is found when a checkpoint is read. The metadata lists the items, so a missing item
or missing checksums count as damage, not as a checkpoint that never had them.

A run may delete a checkpoint while another process reads it; that process then reads the newest checkpoint.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import operator
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from larp_jax import files, npz, storage
from larp_jax.config import TokenizerRecipe, parse_recipe
from larp_jax.errors import InputError, reason
from larp_jax.files import read_json
from larp_jax.state import TrainState
from larp_jax.weights import released
from larp_jax.weights.checksums import CHECKSUMS, checksums, find_damage, items_of, read_json_item, write_digests

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
COMMITTED = "commit_success.txt"  # in a bucket, what Orbax writes last into a checkpoint
TRIES = 100  # attempts to read the newest checkpoint of a workdir while a run replaces it

logger = logging.getLogger(__name__)
# Orbax logs every save at INFO, restoring at WARNING, and the errors that it raises, with tracebacks, at ERROR.
logging.getLogger("absl").setLevel(logging.CRITICAL)
# Replicas share the writing of large arrays only: to split an array takes a compiled program for each shape.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20), override=True
)


class SaveFailed(RuntimeError):
    """The last state of a run could not be saved."""


class CheckpointManager:
    """Saves and restores a run's `TrainState`.

    A checkpoint that cannot be written (full disk, no network) does not stop the run: the error is logged, and later
    saves are still tried.

    Args:
      workdir: folder of the run.
      keep: number of newest checkpoints to keep.
      best_metric: name of an evaluation metric; the checkpoint with its highest value is kept too.

    Attributes:
      before_commit: called on the first process when a checkpoint is written, but does not count yet.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int, best_metric: str):
        self.before_commit: Callable[[], None] = lambda: None
        self._root = files.absolute(files.any_path(workdir)) / CHECKPOINTS
        self._remote = storage.is_remote(self._root)
        self._keep, self._best_metric = keep, best_metric
        self._saving: int | None = None  # the step being written
        self._unsaved = ""  # why the last save failed; empty if it did not
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            if self._remote:
                _settle(self._root)
            self._remove_damaged_scores()
        _everywhere("")  # all processes wait for the first
        keeping = ocp.checkpoint_managers
        score = lambda metrics: metrics[self._best_metric]  # noqa: E731
        options = ocp.CheckpointManagerOptions(
            best_fn=score,  # only with it, scores are written and known when the run continues
            preservation_policy=keeping.AnyPreservationPolicy(
                [
                    keeping.LatestN(self._keep),
                    keeping.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
                ]
            ),
            cleanup_tmp_directories=not self._remote,  # incomplete checkpoints of a killed run
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )
        return ocp.CheckpointManager(self._root, options=options)

    def _remove_damaged_scores(self) -> None:
        """Removes files of scores that Orbax could not read: their checkpoints count as damaged, others do not."""
        for path in self._root.glob("*/metrics/metrics"):
            try:
                float(read_json(path)[self._best_metric])
            except (ValueError, TypeError, KeyError):
                path.unlink()

    def _finish(self) -> None:
        """Adds the checksums to a checkpoint that is completely written but not yet renamed or marked as complete."""
        if jax.process_index() == 0:
            for directory in self._root.glob(f"{self._saving}" if self._remote else f"{self._saving}{_TEMPORARY}"):
                write_digests(directory)
            storage.check_locks()
            self.before_commit()

    def save(self, state: TrainState, metadata: Mapping, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving: returns after the arrays are copied; they are written in the background.

        Raises:
          LockLost: another process has taken over the workdir.
        """
        self.wait()
        storage.check_locks()
        self._saving = int(state.step)
        with self._may_fail():
            self._save(state, metadata, metrics)

    def _save(self, state, metadata, metrics) -> None:
        args = ocp.args
        items = {
            "params": args.StandardSave(state.params),
            "optimizer": args.StandardSave({"step": state.step, "state": state.opt_state}),
        }
        if state.ema:
            items["ema"] = args.StandardSave(state.ema)
        items["metadata"] = _metadata_of(metadata, items)
        best = {self._best_metric: metrics[self._best_metric]} if metrics and self._best_metric in metrics else None
        self._manager.save(int(state.step), args=args.Composite(**items), metrics=best)

    def restore_newest(self, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, dict] | None:
        """The newest state that can be read, and its metadata; None if there is no checkpoint.

        Newer checkpoints that are damaged are renamed, because the run will write them again.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found = _everywhere(find_damage(self._root / str(step)) if jax.process_index() == 0 else "")
            if not found:
                try:
                    restored = self.restore(shapes, shardings, step), self.metadata(step)
                except Exception as error:  # damage causes many kinds of errors
                    if jax.process_count() > 1:  # the others may have succeeded
                        raise
                    found = reason(error)
                else:
                    self._put_aside(damaged, step)
                    self._remove_old()
                    return restored
            damaged[step] = found
        if damaged:
            raise InputError(
                f"no checkpoint in {self._root} can be read (the newest, {max(damaged)}: {damaged[max(damaged)]});"
                " restore a copy, or choose another --workdir to start again"
            )
        return None

    def _put_aside(self, damaged: Mapping[int, str], step: int) -> None:
        for newer, found in damaged.items():
            logger.warning(
                "checkpoint %d is damaged (%s) and renamed to %d.damaged; continuing from %d", newer, found, newer, step
            )
            if jax.process_index() == 0:
                (self._root / str(newer)).rename(self._root / _free_name(self._root, f"{newer}.damaged"))
        if damaged:
            _everywhere("")  # all processes wait for the first
            self._manager.reload()

    def _remove_old(self) -> None:
        """Removes what the newest save should have removed, if the run was killed between the two."""
        steps = sorted(self._manager.all_steps())
        if len(steps) <= self._keep:
            return
        scores = {step: (self._manager.metrics(step) or {}).get(self._best_metric) for step in steps}
        best = max((score for score in scores.values() if score is not None), default=None)
        for step in steps[: -self._keep]:
            if best is None or scores[step] != best:
                self._manager.delete(step)

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata given to `save`."""
        return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def restore(self, shapes: TrainState, shardings: TrainState, step: int) -> TrainState:
        """The state of a checkpoint, placed according to `shardings`, independent of the mesh that wrote it."""
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

    def wait(self) -> bool:
        """Returns when the save in progress has ended, and whether the last save succeeded; a failure is logged."""
        with self._may_fail():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._saving is not None:
                self._saving, self._unsaved = None, ""
        return not self._unsaved

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Context manager for writing: logs errors instead of raising them."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1:  # the others may have succeeded and wait for this one
                raise
            self._unsaved = f"checkpoint {self._saving} cannot be written in {self._root} ({reason(error)})"
            logger.warning("%s; training continues and will retry", self._unsaved)
            self._saving = None
            with contextlib.suppress(Exception):
                self._manager.close()
            self._remove_partial()
            self._manager = self._open()

    def _remove_partial(self) -> None:
        """Removes the files of a failed save, whose threads may keep writing for a moment."""
        if self._remote:
            return  # by `_settle`
        for _ in range(20):
            for directory in self._root.glob(f"*{_TEMPORARY}"):
                files.remove_tree(directory)
            time.sleep(0.1)
            if not any(self._root.glob(f"*{_TEMPORARY}")):
                break

    def close(self) -> None:
        """Waits for the save in progress and releases resources."""
        self.wait()
        self._manager.close()

    def check_saved(self) -> None:
        """`SaveFailed` if the last save failed."""
        if self._unsaved:
            newest = self._manager.latest_step()
            kept = "there is no earlier one" if newest is None else f"the newest is {newest}"
            cure = "Check the bucket" if self._remote else "Free some space"
            raise SaveFailed(f"{self._unsaved}; {kept}. {cure}, and the same command continues")


_TEMPORARY = ".orbax-checkpoint-tmp*"  # pattern of the names of incomplete checkpoints on a disk


def _settle(root: pathlib.Path) -> None:
    """Removes incomplete checkpoints of killed runs and failed saves from a bucket.

    Intact ones that only lack the mark, because they were copied from a disk, get it.
    """
    for directory in root.glob("*"):
        if not _is_step(directory) or (directory / COMMITTED).exists():
            continue
        if (directory / CHECKSUMS).exists() and not find_damage(directory):
            files.write_bytes(directory / COMMITTED, b"found complete")
        else:
            files.remove_tree(directory)


def _everywhere(text: str) -> str:
    """The text of the first process, on all processes."""
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


def _metadata_of(metadata: Mapping, items: Collection[str]) -> ocp.args.JsonSave:
    """The item `metadata`, which lists itself and the other items: all of them must have checksums."""
    return ocp.args.JsonSave({**metadata, "items": sorted([*items, "metadata"])})


@contextlib.contextmanager
def claim(workdir: str | os.PathLike) -> Iterator[None]:
    """Context manager: locks a workdir for this run; creates it if missing. Only the first process takes the lock.

    Raises:
      InputError: another process has locked it, or it cannot be written.
    """
    if jax.process_index():
        yield
        return
    with files.claim(workdir, "--workdir"):
        yield


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read for use, without its optimizer.

    Attributes:
      path: its directory.
      recipe: configuration of the run.
      params: parameters by module as NumPy arrays: the EMA, if it was requested and exists, or the raw weights.
      step: number of optimizer steps; 0 if unknown.
      code_counts: [K] int64, how often the last evaluation used each code; None if unknown.
      mean_clip: [T, H, W, C] float32 in [0, 1], the mean of training clips; None if unknown.
      tokenizer_fingerprint: for a generator, that of the tokenizer whose codes it was trained on; None if unknown.
      class_counts: for a generator, number of training clips per class, [classes] int64; None if unknown.
      class_names: for a generator, the classes of its training data in the order of their labels; empty if unknown.
      class_codes: for a generator with a ladder, the mean number of codes of the training clips of each class, None
        where there are none; empty if unknown.
      statistics: for a flow generator, mean and standard deviation of each channel of the latents of its training
        clips, [d] float32 each; None for others.
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
    class_codes: tuple[float | None, ...] = ()
    statistics: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, path: pathlib.Path, recipe: Any, params: dict, known: Mapping[str, Any], **more) -> "Checkpoint":
        """A checkpoint whose metadata, which come from JSON, are these."""
        counts = {
            name: None if known.get(name) is None else np.asarray(known[name], np.int64)
            for name in ("code_counts", "class_counts")
        }
        names = tuple(known.get("class_names") or ())
        if not all(isinstance(name, str) for name in names):
            raise ValueError("its class_names are not strings")
        more = {"mean_clip": None} | more
        if (latents := known.get("latent_statistics")) is not None:
            more["statistics"] = tuple(np.asarray(latents[name], np.float32) for name in ("mean", "std"))
        return cls(
            path=path,
            recipe=recipe,
            params=params,
            step=operator.index(known.get("step", 0)),
            tokenizer_fingerprint=known.get("tokenizer_fingerprint"),
            class_names=names,
            class_codes=tuple(mean if mean is None else float(mean) for mean in known.get("class_codes") or ()),
            **counts,
            **more,
        )


def is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a directory is a checkpoint itself (as opposed to a workdir); it may be damaged."""
    return any((path / item).is_dir() for item in ("params", "metadata"))


def newest(path: str | os.PathLike) -> pathlib.Path | None:
    """The checkpoint at a path: the path itself, or the newest checkpoint of a workdir; None if there is none.

    It may be damaged, and a run may delete it before it is read.
    """
    path = files.any_path(path, "checkpoint")
    if is_checkpoint(path):
        return path
    if files.absolute(path).parent.name == CHECKPOINTS and _is_step(path) and path.is_dir():
        return path
    return max(_of_run(path), key=lambda step: int(step.name), default=None)


def steps(workdir: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in a workdir, intact or damaged."""
    return [int(path.name) for path in _of_run(files.any_path(workdir))]


def _of_run(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The complete checkpoints in a workdir, intact or damaged."""
    found = [path for path in (workdir / CHECKPOINTS).glob("*") if _is_step(path) and path.is_dir()]
    return [path for path in found if (path / COMMITTED).exists()] if storage.is_remote(workdir) else found


def _is_step(path: pathlib.Path) -> bool:
    return path.name.isascii() and path.name.isdigit()


def load(path: str | os.PathLike, *, weights: str = "ema") -> Checkpoint:
    """Reads the checkpoint at a path: the newest of a workdir, a step directory or an imported directory.

    Args:
      path: the directory.
      weights: `ema` for the EMA weights if there are any, `raw` for the raw weights.

    Raises:
      InputError: there is no checkpoint, or it cannot be read.
    """
    if newest(path) is None:
        raise InputError(f"no checkpoint in {path}: give a workdir, one of its checkpoints, or an imported directory")
    return _of_newest(path, lambda directory: _load(directory, weights))


def read_metadata(path: str | os.PathLike) -> dict[str, Any] | None:
    """Metadata of the checkpoint at a path, without its arrays; None if there is no checkpoint.

    Raises:
      InputError: the checkpoint cannot be read.
    """

    def read(directory):
        _refuse_damaged(directory, ("metadata",))
        return read_json_item(directory)

    return None if newest(path) is None else _of_newest(path, read)


def _of_newest(path: str | os.PathLike, read: Callable[[pathlib.Path], Any]) -> Any:
    """Reads the checkpoint at a path; if that fails and there is a newer one by then, reads that."""
    _keep_threads_quiet()
    directory = newest(path)
    for number in itertools.count(1):
        try:
            return read(files.absolute(directory))
        except Exception as error:
            newer = newest(path)
            if newer not in (None, directory) and number < TRIES:
                directory = newer
                continue
            if isinstance(error, InputError):
                raise
            # damage causes many kinds of errors
            raise InputError(f"checkpoint {directory} cannot be read ({reason(error)}); use another step") from error


def _keep_threads_quiet() -> None:
    """Hides tracebacks of TensorStore's threads, from now on.

    If Orbax fails to read one array, these threads keep reading the others for a while and raise errors because its
    event loop is closed. Everything else that reaches `sys.unraisablehook` is shown as before.
    """
    if getattr(sys.unraisablehook, "func", None) is not _show_unraisable:
        sys.unraisablehook = functools.partial(_show_unraisable, sys.unraisablehook)


def _show_unraisable(show: Callable, unraisable) -> None:
    late = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    if not late or threading.current_thread() is threading.main_thread():
        show(unraisable)


def _refuse_damaged(directory: pathlib.Path, items: Collection[str]) -> None:
    if found := find_damage(directory, items):
        raise InputError(f"checkpoint {directory} is damaged ({found}); use another step")


def _load(directory: pathlib.Path, weights: str) -> Checkpoint:
    expected = checksums(directory)
    items = {path.name for path in directory.iterdir()} if expected is None else items_of(expected)
    item = "ema" if weights == "ema" and "ema" in items else "params"
    _refuse_damaged(directory, ("metadata", item))
    metadata = read_json_item(directory)
    if "config" not in metadata:
        raise ValueError("its metadata contains no config")
    try:
        recipe = parse_recipe(metadata["config"])
    except InputError as error:
        raise InputError(f"checkpoint {directory} has settings that this version does not support: {error}") from error
    with ocp.PyTreeCheckpointer() as reader:
        arrays = reader.metadata(directory / item).item_metadata
        if arrays is None:
            raise ValueError(f"the description of {item} is missing")
        released.check_sizes(recipe, arrays.tree)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays.tree)
        params = reader.restore(directory / item, restore_args=as_numpy)
    mean_clip = None
    if directory.parent.name == CHECKPOINTS and isinstance(recipe, TokenizerRecipe):
        path = directory.parent.parent / MEAN_CLIP
        mean_clip = read_mean_clip(path, recipe.model.clip_shape) if path.exists() else None
    return Checkpoint.of(directory, recipe, params, metadata, mean_clip=mean_clip)


def write_imported(
    directory: str | os.PathLike, recipe: Mapping, params: dict, known: Mapping[str, Any] | None = None
) -> None:
    """Writes imported parameters as a checkpoint without optimizer; does not overwrite anything.

    Args:
      directory: created.
      recipe: ready for JSON.
      params: parameters by module.
      known: what else is known, from `larp_jax.weights.importing.read_model`.

    Raises:
      InputError: the directory exists and is not empty.
    """
    args = ocp.args
    with files.new_folder(directory) as folder, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            folder / "0",
            args=args.Composite(
                params=args.StandardSave(params),
                metadata=_metadata_of({"step": 0, **(known or {}), "config": dict(recipe)}, ["params"]),
            ),
        )
        for path in (folder / "0").iterdir():
            path.rename(folder / path.name)
        (folder / "0").rmdir()
        write_digests(folder)


MEAN_CLIP = "mean_clip.npz"


def write_mean_clip(workdir: str | os.PathLike, clip: np.ndarray) -> None:
    """Writes the mean training clip, float [T, H, W, C]: the output of a collapsed tokenizer, as a baseline."""
    path = files.any_path(workdir) / MEAN_CLIP
    with files.writing(path) as file:  # another process may read it at the same time
        np.savez_compressed(file, mean_clip=clip.astype(np.float32))


def read_mean_clip(path: str | os.PathLike, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the clip that `write_mean_clip` wrote, float32 of this shape.

    Raises:
      InputError: the file is damaged, or contains a clip of another shape.
    """
    fix = "remove it; training will write it again"
    return npz.read(path, {"mean_clip": npz.Array(np.float32, shape)}, fix)["mean_clip"]


def write_config(workdir: str | os.PathLike, recipe: Mapping) -> None:
    """Writes `config.json` atomically."""
    files.write_json(files.any_path(workdir) / CONFIG, recipe, indent=2)


def read_config(workdir: str | os.PathLike) -> dict | None:
    """The contents of `config.json`, or if missing the recipe of the newest checkpoint; None if neither exists.

    Raises:
      InputError: it cannot be read, or is not a recipe.
    """
    path = files.any_path(workdir) / CONFIG
    try:
        try:
            values = read_json(path)
        except FileNotFoundError:
            metadata = read_metadata(workdir)
            if metadata is None:
                return None
            values = metadata.get("config")
        if not isinstance(values, dict):
            raise ValueError(f"it contains a {type(values).__name__}")
        return values
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a recipe ({reason(error)}); restore it or choose another --workdir") from error
