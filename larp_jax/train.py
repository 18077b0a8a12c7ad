"""The trainer: one loop for every stage.

A turn evaluates, saves, fetches, steps and writes, in this order. Evaluation comes before saving, so that a checkpoint
carries the score it is kept for. Both look at the state before the step, so what a step number means is the same
everywhere: so many updates done. Writing comes last and speaks of the step before: the device is never waited for
while there is work to hand it.
"""

import contextlib
import logging
import math
import os
import pathlib
import signal

import jax

from larp_jax import checkpoint, sharding
from larp_jax.config import GeneratorRecipe, TokenizerRecipe, to_dict
from larp_jax.errors import InputError
from larp_jax.tasks import TASKS
from larp_jax.writers import MetricWriter, Progress

logger = logging.getLogger(__name__)

MAY_CHANGE = {"steps", "log_every", "eval_every", "save_every", "keep", "mesh", "remat", "accumulate", "tokenizer",
              "data.eval", "data.workers", "data.eval_clips"}  # fmt: skip


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved a checkpoint first."""


class Diverged(RuntimeError):
    """A logged value became NaN or infinite; checkpoints on disk are from before."""


def train(recipe: TokenizerRecipe | GeneratorRecipe, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains a stage to its last step, from the newest checkpoint in the workdir if there is one.

    Args:
      recipe: what `larp_jax.config.parse_recipe` gave.
      workdir: folder of the run; made if missing.

    Returns:
      The last evaluation's scalars.

    Raises:
      InputError: the recipe does not fit the data, the devices, or the run that the workdir holds.
      Diverged: a value became NaN or infinite.
      Stopped: after SIGINT or SIGTERM.
    """
    mesh = sharding.make_mesh(recipe.mesh)
    sharding.check_batch(recipe.data.batch_size, mesh, recipe.accumulate)
    with jax.set_mesh(mesh), StopRequest() as stop, contextlib.ExitStack() as held:
        return Run(recipe, pathlib.Path(workdir), mesh, stop, held).loop()


class Run:
    """Everything a run holds on to: task, state, checkpoints, writers; `held` gets what is let go of in the end."""

    def __init__(self, recipe, workdir: pathlib.Path, mesh, stop: "StopRequest", held: contextlib.ExitStack):
        self.workdir, self.mesh, self.stop = workdir, mesh, stop
        self.key = jax.random.key(recipe.seed)
        # the data is opened before anything is written, so that a wrong path leaves no workdir behind
        self.task = TASKS[recipe.stage](recipe, mesh)
        self.recipe, stage = self.task.recipe, self.task.stage
        shapes = jax.eval_shape(stage.init, self.key)
        placement = sharding.state_shardings(shapes, mesh)
        sharding.check_sharded(shapes, placement, mesh)
        self.train_step = jax.jit(
            stage.train_step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh))
        )
        self._claim_workdir(held)
        self.manager = checkpoint.CheckpointManager(workdir, keep=recipe.keep, best_metric=recipe.best_metric)
        found = self.manager.restore_newest(shapes, placement)
        if found is None:
            state = jax.jit(stage.init, out_shardings=placement)(self.key)
            self.state = self.task.start(state, placement, jax.random.fold_in(self.key, 1))
        else:
            self.state, metadata = found
            self.task.resume(metadata)
            logger.info("continuing %s from step %d", workdir, self.state.step)
        self.first_step = self.step = int(self.state.step)
        self.writer = MetricWriter(workdir, restored_step=self.first_step)
        self.task.open_evaluation(workdir)

    def loop(self) -> dict[str, float]:
        """Runs to the last step; on the way out, whatever happens, what is being saved is saved whole."""
        recipe = self.recipe
        pending = None  # the logs of the last step, not yet waited for
        batches = self.task.batches(self.first_step)
        with batches, self.writer, self._progress() as progress:
            try:
                while True:
                    scores = {}
                    done = self.step >= recipe.steps
                    stopping = self.stop.requested()
                    new = self.step > self.first_step
                    save = done or stopping or self.step % recipe.save_every == 0
                    if new and (save or self.step % recipe.eval_every == 0):
                        pending = self._write(pending, progress)  # nothing is saved unless it was seen to be finite
                    if done or (new and not stopping and self.step % recipe.eval_every == 0):
                        scores = self.task.evaluate(self.state, self.step, self.writer)
                    if new and save:
                        self._save(scores)
                        if stopping:
                            break
                    if done or stopping:
                        break
                    batch = next(batches)
                    batch = sharding.to_mesh({name: batch[name] for name in self.task.inputs}, self.mesh)
                    self.state, logs = self.train_step(self.state, batch, self.key, self.task.frozen)
                    self.step += 1
                    self._write(pending, progress)
                    pending = (self.step, logs)
            finally:
                self.manager.close()
        self.manager.check_saved()
        if self.stop.signal is not None and self.step < recipe.steps:
            name = signal.Signals(self.stop.signal).name
            raise Stopped(f"stopped by {name} at step {self.step}, saved; the same command continues")
        return scores

    def _claim_workdir(self, held: contextlib.ExitStack) -> None:
        """Makes the workdir and its config.json, or checks that the run in it is this one."""
        recipe = to_dict(self.recipe)
        try:
            held.enter_context(checkpoint.claim(self.workdir))
            before = checkpoint.read_config(self.workdir)
            if before is not None:
                changed = _differences(before, recipe)
                refused = [name for name in sorted(changed) if not {name, name.partition(".")[0]} & MAY_CHANGE]
                if refused:
                    said = ", ".join(f"{name}={changed[name][0]!r}, not {changed[name][1]!r}" for name in refused[:3])
                    raise InputError(
                        f"{self.workdir} holds a run with {said}; it could not continue as if never stopped: choose "
                        "another --workdir, or the settings it was started with (its config.json)"
                    )
                if changed:
                    said = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in sorted(changed.items()))
                    logger.warning("changed since the run began: %s", said)
            if jax.process_index() == 0:
                checkpoint.write_config(self.workdir, recipe)
        except OSError as error:
            raise InputError(f"--workdir {self.workdir} cannot be written ({error.strerror or error})") from error

    def _progress(self) -> Progress:
        return Progress(
            self.recipe.steps, description="train", initial=self.first_step, clips_per_unit=self.recipe.data.batch_size
        )

    def _write(self, pending, progress: Progress) -> None:
        """Waits for a step's logs, checks them, shows them and, every `log_every` steps, writes them."""
        if pending is None:
            return None
        step, logs = pending
        logs = {name: float(value) for name, value in jax.device_get(logs).items()}
        logged = step % self.recipe.log_every == 0
        if not logged:
            logs = {name: value for name, value in logs.items() if name not in self.task.only_logged}
        bad = [name for name, value in logs.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(
                f"{', '.join(bad)} became {logs[bad[0]]} in step {step}; the newest checkpoint is from before. "
                "Lower config.optim.learning_rate or set config.optim.clip_norm"
            )
        progress.update(**{name.removeprefix("loss_"): logs[name] for name in self.task.shown if name in logs})
        if logged:
            self.writer.write_scalars(step, {f"train/{name}": value for name, value in logs.items()})
            self.task.watch(step, logs)
        return None

    def _save(self, scores: dict[str, float]) -> None:
        metadata = {"config": to_dict(self.recipe), "step": self.step, **self.task.metadata()}
        self.manager.save(self.state, metadata, scores)


class StopRequest:
    """Turns SIGINT and SIGTERM into a request that the loop reads between steps; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are somebody else's
                pass
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def requested(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if jax.process_count() == 1:
            return self.signal is not None
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(self.signal is not None).any())


def _differences(a: dict, b: dict, prefix: str = "") -> dict[str, tuple]:
    """The values of the settings in which two configurations differ, by their dotted names."""
    found = {}
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found |= _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found[prefix + key] = one, other
    return found
