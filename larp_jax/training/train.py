"""The trainer: one loop for every stage.

Each iteration evaluates, saves, reads a batch, computes a step and writes metrics, in this order. Evaluation comes
before saving, so that a checkpoint contains the score by which it is kept. Both use the state before the step: `step`
counts finished updates. Metrics of the previous step are written last, so that the loop never waits for the device.
"""

import contextlib
import logging
import math
import os
import pathlib
import time

import jax

from larp_jax import files, storage
from larp_jax.config import TRAINING_FIELDS, Recipe, completed, differences, to_dict
from larp_jax.errors import InputError
from larp_jax.runtime import distributed, rng, sharding
from larp_jax.runtime.clock import Clock
from larp_jax.runtime.progress import Progress
from larp_jax.runtime.stopping import StopRequest
from larp_jax.runtime.watchdog import COMPUTE, EVALUATE, READ, SAVE, Watchdog
from larp_jax.training import trackers, warm_start
from larp_jax.training.profile import Profile
from larp_jax.training.stages import TASKS
from larp_jax.training.writers import MetricWriter
from larp_jax.weights import checkpoint, importing

logger = logging.getLogger(__name__)

# Settings, and groups of them, that may change when a run continues: the run is the same, though not bit by bit.
# `size` is only a label: the width, depth and heads that it stands for are compared.
MAY_CHANGE = {"model.size", "prior.size", "steps", "log_every", "eval_every", "save_every", "keep", "tracker", "mesh",
              "remat", "accumulate", "precision", "tokenizer", "router", "data.eval", "data.workers", "data.eval_clips",
              "optim", "loss.quantizer_weight", "loss.prior_weight", "loss.perceptual_weight", "loss.perceptual_frames",
              "loss.adversarial_weight", "loss.alignment_weight", "loss.frame_difference_weight",
              "loss.lecam_weight", "loss.r1_weight", *(f"model.{name}" for name in TRAINING_FIELDS)}  # fmt: skip
# The settings among them that change the contents of a checkpoint when they change to or from 0. `optim.kind` always
# does, because its optimizers have other states.
ON_OR_OFF = {"loss.prior_weight", "loss.adversarial_weight", "loss.alignment_weight", "loss.r1_weight",
             "optim.ema_decay", "optim.weight_decay"}  # fmt: skip

# Pauses in seconds before the last checkpoint of a run in a bucket is tried again.
RETRIES = (10, 30, 60, 120)

# Message after a second Ctrl-C.
HURRIED = "without waiting for the last save; the same command continues from the newest checkpoint"


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved a checkpoint first."""


class Diverged(RuntimeError):
    """A logged value became NaN or infinite; checkpoints on disk are from before."""


@rng.pinned()
def train(recipe: Recipe, workdir: str | os.PathLike, *, profile: int = 0) -> dict[str, float]:
    """Trains a stage to its last step, from the newest checkpoint in the workdir if there is one.

    Args:
      recipe: from `larp_jax.config.parse_recipe`.
      workdir: folder of the run, also in a bucket; created if missing.
      profile: number of steps to record a trace of; 0 for none.

    Returns:
      The scalars of the last evaluation.

    Raises:
      InputError: the recipe does not match the data, the devices, `init_from` or the run in the workdir.
      Diverged: a value became NaN or infinite.
      LockLost: another process has taken over the workdir, which is in a bucket.
      Stopped: after SIGINT or SIGTERM, with everything saved.
      Interrupted: after SIGINT or SIGTERM before the first step, or after a second SIGINT.
    """
    clock = Clock()
    workdir = files.any_path(workdir, "--workdir")
    _check_workdir(workdir)
    distributed.check_devices()
    if distributed.is_first():
        trackers.check(recipe.tracker)
    mesh = sharding.make_mesh(recipe.mesh)
    sharding.check_batch(recipe.data.batch_size, mesh, recipe.accumulate)
    stop = StopRequest("before the first step; nothing new was saved")
    with jax.set_mesh(mesh), stop, contextlib.ExitStack() as resources:
        with clock.measure("start"):
            run = Run(recipe, workdir, mesh, stop, resources, clock)
        return run.loop(profile)


class Run:
    """A run: task, state, checkpoints, writers. Closing `resources` releases the workdir."""

    def __init__(
        self, recipe, workdir: pathlib.Path, mesh, stop: StopRequest, resources: contextlib.ExitStack, clock: Clock
    ):
        self.workdir, self.mesh, self.stop, self.clock = workdir, mesh, stop, clock
        self.key = rng.key(recipe.seed)
        # data is opened before anything is written, so that a wrong path leaves no workdir behind
        self.task = TASKS[recipe.stage](recipe, mesh)
        self.recipe, stage = self.task.recipe, self.task.stage
        shapes = jax.eval_shape(stage.init, self.key)
        placement = self._placement = sharding.state_shardings(shapes, mesh)
        sharding.check_sharded(shapes, placement, mesh)
        start = None
        if recipe.init_from and not checkpoint.steps(workdir):  # also read before anything is written
            start = warm_start.read(self.recipe, shapes.params)
        self.train_step = jax.jit(
            stage.train_step, donate_argnums=0, out_shardings=(placement, sharding.replicated(mesh))
        )
        self._claim_workdir(resources)
        self.manager = checkpoint.CheckpointManager(workdir, keep=recipe.keep, best_metric=recipe.best_metric)
        found = self.manager.restore_newest(shapes, placement)
        if found is None:
            state = jax.jit(stage.init, out_shardings=placement)(self.key)
            self.state = state if start is None else warm_start.apply(state, start, placement)
        else:
            self.state, metadata = found
            self.task.resume(metadata)
            logger.info("continuing %s from step %d", workdir, self.state.step)
        self.first_step = self.step = int(self.state.step)
        self.writer = MetricWriter(
            workdir, restored_step=self.first_step, tracker=recipe.tracker, settings=to_dict(self.recipe)
        )
        self.manager.before_commit = self.writer.flush  # a run that resumes finds the lines up to its checkpoint
        self.task.open_evaluation(workdir)

    def loop(self, profile: int = 0) -> dict[str, float]:
        """Runs to the last step. A checkpoint that is being saved is completed after any error."""
        recipe = self.recipe
        trace = Profile(self.workdir, profile, self.first_step)
        pending = None  # the step and logs of the last update, which the device may still be computing
        batches = self.task.batches(self.first_step)
        stopping, compiled = False, set()
        if jax.process_count() > 1:
            self.stop.defer(HURRIED)  # all processes stop after the same step
        with batches, self.writer, self._progress() as progress, Watchdog() as watchdog:
            try:
                while True:
                    scores = {}
                    done = self.step >= recipe.steps
                    stopping = self._asked_to_stop()
                    new = self.step > self.first_step
                    save = done or stopping or self.step % recipe.save_every == 0
                    if new and (save or self.step % recipe.eval_every == 0):
                        pending = self._write(pending, progress)  # only a state with finite logs is saved
                    if done or (new and not stopping and self.step % recipe.eval_every == 0):
                        watchdog.at(self.step, EVALUATE, slow=True)
                        with self.clock.measure("evaluation"):
                            scores = self.task.evaluate(self.state, self.step, self.writer)
                    if new and save:
                        watchdog.at(self.step, SAVE, slow=True)
                        self._save(scores, last=done or stopping)
                        if stopping:
                            break
                    if done or stopping:
                        break
                    watchdog.at(self.step, READ, slow=not new)
                    with self.clock.measure("input"):
                        batch = next(batches)
                    batch = sharding.to_mesh({name: batch[name] for name in self.task.inputs}, self.mesh)
                    shapes = tuple(x.shape for x in batch.values())
                    known = shapes in compiled
                    compiled.add(shapes)
                    watchdog.at(self.step, COMPUTE, slow=not known)
                    with contextlib.nullcontext() if known else self.clock.measure("start"):  # it compiles
                        self.state, logs = self.train_step(self.state, batch, self.key, self.task.frozen)
                    self.step += 1
                    self.state = self.task.after_step(self.state, self.step, self._placement, self.key)
                    self.stop.defer(HURRIED)  # from now on there is something to save
                    self._write(pending, progress)
                    pending = (self.step, logs)
                    trace.at(self.step, self.state)
            finally:
                trace.close()
                self.manager.close()
        self.manager.check_saved()
        if stopping and self.step < recipe.steps:
            saved = "saved" if self.step > self.first_step else "nothing was saved"
            raise Stopped(f"stopped by {self.stop.name} at step {self.step}, {saved}; the same command continues")
        return scores

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        asked = self.stop.signal is not None
        if jax.process_count() == 1:
            return asked
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(asked).any())

    def _claim_workdir(self, resources: contextlib.ExitStack) -> None:
        """Creates the workdir and its config.json, or checks that the run in it is this one."""
        recipe = to_dict(self.recipe)
        try:
            resources.enter_context(checkpoint.claim(self.workdir))
            before = checkpoint.read_config(self.workdir)
            changed = {} if before is None else differences(completed(before), recipe)
            if changed and not checkpoint.steps(self.workdir):
                logger.info("%s contains no checkpoint; the new recipe replaces the old one", self.workdir)
                if jax.process_index() == 0:
                    (self.workdir / checkpoint.MEAN_CLIP).unlink(missing_ok=True)
            elif changed:
                refused = [name for name in sorted(changed) if not _may_change(name, *changed[name])]
                if refused:
                    said = ", ".join(f"{name}={changed[name][0]!r}, not {changed[name][1]!r}" for name in refused[:3])
                    raise InputError(
                        f"{self.workdir} holds a run with {said}; it cannot continue with these settings: choose "
                        "another --workdir, or the settings it was started with (its config.json)"
                    )
                said = ", ".join(f"{name} from {old!r} to {new!r}" for name, (old, new) in sorted(changed.items()))
                logger.warning("settings changed since the run started: %s", said)
            if jax.process_index() == 0:
                checkpoint.write_config(self.workdir, recipe)
        except OSError as error:
            raise InputError(f"--workdir {self.workdir} cannot be written ({error.strerror or error})") from error

    def _progress(self) -> Progress:
        return Progress(
            self.recipe.steps, description="train", initial=self.first_step, clips_per_unit=self.recipe.data.batch_size
        )

    def _write(self, pending, progress: Progress) -> None:
        """Waits for the logs of a step, checks and shows them, and writes them every `log_every` steps."""
        if pending is None:
            return None
        step, logs = pending
        logs = {name: float(value) for name, value in jax.device_get(logs).items()}
        logged = step % self.recipe.log_every == 0
        if not logged:
            logs = {name: value for name, value in logs.items() if name not in self.task.only_logged}
        bad = [name for name, value in logs.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(f"{', '.join(bad)} became {logs[bad[0]]} in step {step}; {self._cure(step)}")
        progress.update(**{name.removeprefix("loss_"): logs[name] for name in self.task.shown if name in logs})
        if logged:
            storage.check_locks()
            scalars = {f"train/{name}": value for name, value in logs.items()}
            self.writer.write_scalars(step, scalars | self.clock.read(step))
            self.task.watch(step, logs)
        return None

    def _cure(self, step: int) -> str:
        """Which checkpoint is left after divergence in a step, and what to change."""
        if step == 1:
            start = " config.init_from" if self.recipe.init_from else ""
            return (
                "no update was made before, so learning rates are not the cause. Check the clips of config.data.train,"
                f"{start} and config.precision"
            )
        kept = checkpoint.steps(self.workdir)
        left = f"the newest checkpoint is that of step {max(kept)}" if kept else "there is no checkpoint yet"
        return (
            f"{left}. Lower config.optim.learning_rate, set config.optim.clip_norm=1 or config.precision=float32; the"
            " same command with that change continues"
        )

    def _save(self, scores: dict[str, float], *, last: bool) -> None:
        """Starts to save. The last state of a run is tried again and again, if the network may be the cause."""
        metadata = {"config": to_dict(self.recipe), "step": self.step, **self.task.metadata()}
        with self.clock.measure("checkpoint"):
            self.manager.save(self.state, metadata, scores)
        for pause in RETRIES if last and storage.is_remote(self.workdir) else ():
            if self.manager.wait():
                break
            time.sleep(pause)
            self.manager.save(self.state, metadata, scores)


def _check_workdir(workdir: pathlib.Path) -> None:
    """`InputError` if a folder contains something other than a run, which training would hide or overwrite."""
    if checkpoint.is_checkpoint(workdir) or (workdir / importing.WEIGHTS).is_file():
        raise InputError(
            f"--workdir {workdir} holds weights, no run; to train from them, give --config.init_from={workdir}"
            " and another --workdir"
        )
    try:
        before = checkpoint.read_config(workdir)
    except OSError:  # reported when config.json is written
        return
    if before is not None and before.get("stage") not in TASKS:
        raise InputError(f"{workdir / checkpoint.CONFIG} is not that of a run; choose another --workdir")


def _may_change(name: str, before, after) -> bool:
    """Whether a run may continue with another value of a setting."""
    if name == "optim.kind" or (name in ON_OR_OFF and bool(before) != bool(after)):
        return False
    parts = name.split(".")
    return any(".".join(parts[: i + 1]) in MAY_CHANGE for i in range(len(parts)))
