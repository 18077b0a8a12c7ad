"""A trace of some training steps, for TensorBoard and Perfetto."""

import contextlib
import logging
import os
import pathlib

import jax

from larp_jax import files
from larp_jax.errors import reason

logger = logging.getLogger(__name__)

WARM_UP = 2  # steps before the trace: the first one compiles
FOLDER = "profile"


class Profile:
    """Records what devices and host do during some steps, with `jax.profiler`.

    The trace is written to `profile/STEP/` in the workdir, where STEP is the last step before it. In a run of several
    processes only the first one records. A trace that cannot be written does not stop the run.

    Args:
      workdir: folder of the run.
      steps: number of steps to record; 0 for none.
      first: number of steps that were finished before this process started.
    """

    def __init__(self, workdir: str | os.PathLike, steps: int, first: int):
        self._folder = files.any_path(workdir) / FOLDER
        self._steps = steps if jax.process_index() == 0 else 0
        self._begin = first + WARM_UP
        self._recording = contextlib.ExitStack()
        self._active = False

    def at(self, step: int, state) -> None:
        """Starts or ends the recording, after this number of finished steps; `state` is what they compute."""
        if self._steps and step == self._begin:
            jax.block_until_ready(state)
            self._start(step)
        elif self._active and step == self._begin + self._steps:
            jax.block_until_ready(state)
            self.close()

    def _start(self, step: int) -> None:
        folder = self._folder / f"{step:08d}"
        number = 1
        while folder.exists():
            number += 1
            folder = self._folder / f"{step:08d}.{number}"
        temporary = self._recording.enter_context(files.new_folder(folder, "--profile"))
        jax.profiler.start_trace(pathlib.Path(temporary))
        self._recording.callback(jax.profiler.stop_trace)
        self._active, self._target = True, folder

    def close(self) -> None:
        """Ends the recording, if there is one, and writes it."""
        if not self._active:
            return
        self._active = False
        try:
            self._recording.close()
        except Exception as error:
            logger.warning("the trace cannot be written (%s); training continues", reason(error))
        else:
            logger.info("trace of %d steps: %s", self._steps, self._target)
