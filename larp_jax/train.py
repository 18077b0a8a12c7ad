"""The trainer: one loop for every stage.

A turn evaluates, saves, fetches, steps and writes, in this order. Evaluation comes before saving, so that a checkpoint
carries the score it is kept for. Both look at the state before the step, so what a step number means is the same
everywhere: so many updates done. Writing comes last and speaks of the step before: the device is never waited for
while there is work to hand it.
"""

import logging
import math
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax import checkpoint, data, sharding
from larp_jax.config import to_dict
from larp_jax.data.video import frame_grid
from larp_jax.errors import InputError
from larp_jax.evaluators import ReconstructionEvaluator, available, own_metrics
from larp_jax.protocols import ClipSet
from larp_jax.steps import STAGES
from larp_jax.writers import MetricWriter, Progress

logger = logging.getLogger(__name__)

MEAN_CLIP_CLIPS = 256
MAY_CHANGE = ("steps", "log_every", "eval_every", "save_every", "keep", "mesh", "remat", "accumulate", "data.eval",
              "data.workers", "data.eval_clips")  # fmt: skip
SHOWN = ("loss", "loss_reconstruction", "loss_prior", "loss_adversarial", "psnr", "perplexity")


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and saved a checkpoint first."""


class Diverged(RuntimeError):
    """A logged value became NaN or infinite; checkpoints on disk are from before."""


def train(recipe, workdir: str | os.PathLike) -> dict[str, float]:
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
    if recipe.stage not in STAGES:
        raise InputError(f"stage {recipe.stage!r} cannot be trained by this version; choose {', '.join(STAGES)}")
    mesh = sharding.make_mesh(recipe.mesh)
    sharding.check_batch(recipe.data.batch_size, mesh, recipe.accumulate)
    with jax.set_mesh(mesh), StopRequest() as stop:
        return Run(recipe, pathlib.Path(workdir), mesh, stop).loop()


class Run:
    """Everything a run holds on to: stage, state, data, checkpoints, writers."""

    def __init__(self, recipe, workdir: pathlib.Path, mesh, stop: "StopRequest"):
        self.recipe, self.workdir, self.mesh, self.stop = recipe, workdir, mesh, stop
        self.stage = STAGES[recipe.stage](recipe)
        self.key = jax.random.key(recipe.seed)
        shapes = jax.eval_shape(self.stage.init, self.key)
        placement = sharding.state_shardings(shapes, mesh)
        replicated = sharding.replicated(mesh)
        self.frozen = jax.device_put(self.stage.frozen(), replicated)
        self.train_step = jax.jit(
            self.stage.train_step, donate_argnums=0, out_shardings=(placement, replicated)
        )

        self.clip = data.ClipSpec(
            frames=recipe.model.frames, resolution=recipe.model.resolution, flip=recipe.data.flip
        )
        # opened before anything is written, so that a wrong path leaves no workdir behind
        data.open_source(recipe.data.train, self.clip)
        self._claim_workdir()
        self.manager = checkpoint.CheckpointManager(workdir, keep=recipe.keep, best_metric=recipe.best_metric)
        latest = self.manager.latest_step()
        if latest is None:
            self.state = jax.jit(self.stage.init, out_shardings=placement)(self.key)
            if recipe.data_init_clips:
                clips = jax.device_put(self._some_clips(recipe.data_init_clips), replicated)
                start = jax.jit(self.stage.data_init, donate_argnums=0, out_shardings=placement)
                self.state = start(self.state, clips, jax.random.fold_in(self.key, 1))
        else:
            self.state = self.manager.restore(shapes, placement, latest)
            logger.info("continuing %s from step %d", workdir, latest)
        self.first_step = self.step = latest or 0
        self.writer = MetricWriter(workdir, restored_step=self.first_step)
        self.code_counts = None
        self.evaluator = self._make_evaluator()

    def loop(self) -> dict[str, float]:
        """Runs to the last step; on the way out, whatever happens, what is being saved is saved whole."""
        recipe = self.recipe
        scores = {}
        pending = None  # the logs of the last step, not yet waited for
        batches = data.train_batches(
            recipe.data.train,
            self.clip,
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
            start_step=self.first_step,
            workers=recipe.data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with batches, self.writer, self._progress() as progress:
            try:
                while True:
                    done = self.step == recipe.steps
                    stopping = self.stop.requested()
                    new = self.step > self.first_step
                    save = done or stopping or self.step % recipe.save_every == 0
                    if new and (save or self.step % recipe.eval_every == 0):
                        pending = self._write(pending, progress)  # nothing is saved unless it was seen to be finite
                    if done or (new and not stopping and self.step % recipe.eval_every == 0):
                        scores = self._evaluate()
                    if new and save:
                        self._save(scores)
                        if stopping:
                            break
                    if done or stopping:
                        break
                    batch = sharding.to_mesh({"video": next(batches)["video"]}, self.mesh)
                    self.state, logs = self.train_step(self.state, batch, self.key, self.frozen)
                    self.step += 1
                    self._write(pending, progress)
                    pending = (self.step, logs)
            finally:
                self.manager.close()
        if self.stop.signal is not None and self.step < recipe.steps:
            name = signal.Signals(self.stop.signal).name
            raise Stopped(f"stopped by {name} at step {self.step}, saved; the same command continues")
        return scores

    def _claim_workdir(self) -> None:
        """Makes the workdir and its config.json, or checks that the run in it is this one."""
        recipe = to_dict(self.recipe)
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            before = checkpoint.read_config(self.workdir)
            if before is not None:
                changed = sorted(_differences(before, recipe))
                refused = [name for name in changed if not name.startswith(MAY_CHANGE)]
                if refused:
                    raise InputError(
                        f"{self.workdir} holds a run with another {', '.join(refused[:3])}; "
                        "choose another --workdir, or the settings it was started with (its config.json)"
                    )
                if changed:
                    logger.warning("changed since the run began: %s", ", ".join(changed))
            if jax.process_index() == 0:
                checkpoint.write_config(self.workdir, recipe)
        except OSError as error:
            raise InputError(f"--workdir {self.workdir} cannot be written ({error.strerror or error})") from error

    def _make_evaluator(self):
        recipe = self.recipe
        if not recipe.data.eval:
            return None
        path = self.workdir / checkpoint.MEAN_CLIP
        if path.exists():
            mean_clip = checkpoint.read_mean_clip(path)
        else:
            # what a tokenizer whose codes say nothing gives at best
            mean_clip = self._some_clips(MEAN_CLIP_CLIPS).mean(axis=0) / 255.0
            if jax.process_index() == 0:
                checkpoint.write_mean_clip(self.workdir, mean_clip)
        return ReconstructionEvaluator(
            lambda params: self.stage.module("tokenizer", params),
            ClipSet(recipe.data.eval, self.clip, max_clips=recipe.data.eval_clips),
            self.mesh,
            own_metrics(available(recipe, self.stage.graphdefs), recipe, mean_clip=mean_clip),
            batch_size=recipe.data.batch_size,
        )

    def _some_clips(self, count: int) -> np.ndarray:
        """Training clips, uint8 [count, T, H, W, 3], the same on every process and in every run of this seed."""
        videos = []
        with data.train_batches(self.recipe.data.train, self.clip, batch_size=16, seed=self.recipe.seed) as batches:
            while len(videos) * 16 < count:
                videos.append(next(batches)["video"])
        return np.concatenate(videos)[:count]

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
            logs.pop("ssim", None)  # computed in logged steps only
        bad = [name for name, value in logs.items() if not math.isfinite(value)]
        if bad:
            raise Diverged(
                f"{', '.join(bad)} became {logs[bad[0]]} in step {step}; the newest checkpoint is from before. "
                "Lower config.optim.learning_rate or set config.optim.clip_norm"
            )
        progress.update(**{name.removeprefix("loss_"): logs[name] for name in SHOWN if name in logs})
        if logged:
            self.writer.write_scalars(step, {f"train/{name}": value for name, value in logs.items()})
            if logs.get("perplexity", math.inf) < 2.0 and step >= 10 * self.recipe.log_every:
                logger.warning(
                    "step %d: codes have collapsed to perplexity %.2f; see the README on small runs",
                    step,
                    logs["perplexity"],
                )
        return None

    def _evaluate(self) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        scores, extras = self.evaluator.run(self.state.ema or self.state.params)
        self.code_counts = None if extras["codes"] is None else extras["codes"].counts.sum(axis=0)
        self.writer.write_scalars(self.step, {f"eval/{name}": value for name, value in scores.items()})
        logger.info("step %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if scores["psnr"] < scores["psnr_mean_clip"] + 0.1 and self.step > self.recipe.steps // 10:
            logger.warning(
                "step %d: reconstructions are no better than the mean training clip (%.2f dB)",
                self.step,
                scores["psnr_mean_clip"],
            )
        if len(extras["examples"]):
            rows = [video for pair in extras["examples"] for video in pair]
            self.writer.write_image(self.step, "reconstruction", frame_grid(rows))
            side_by_side = np.concatenate([np.concatenate(list(pair), axis=2) for pair in extras["examples"]], axis=1)
            self.writer.write_video(self.step, "reconstruction", side_by_side, fps=8)
        return scores

    def _save(self, scores: dict[str, float]) -> None:
        metadata = {"config": to_dict(self.recipe), "step": self.step}
        if self.code_counts is not None:
            metadata["code_counts"] = self.code_counts.tolist()
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

        return bool(multihost_utils.process_allgather(jnp.asarray(self.signal is not None)).any())


def _differences(a: dict, b: dict, prefix: str = "") -> set[str]:
    """Dotted names of the settings in which two configurations differ."""
    names = set()
    for key in a.keys() | b.keys():
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names |= _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            names.add(prefix + key)
    return names
