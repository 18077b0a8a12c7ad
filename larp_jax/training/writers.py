"""Metrics, images and videos of a run, by step."""

import errno
import importlib.util
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from larp_jax import files
from larp_jax.data import video
from larp_jax.errors import InputError, reason
from larp_jax.files import parse_json

logger = logging.getLogger(__name__)

LAST_STEP = 2**53  # larger integers are not exact as floats, which charts need
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class MetricWriter:
    """Writes the scalars and media of a run into its workdir; only the process with index 0 writes anything.

    `metrics.jsonl` contains one strict JSON object per line: `step`, `wall_time` (seconds since the epoch) and every
    scalar of that step; NaN and infinities become null. Steps increase from line to line, and a line is on disk when
    `write_scalars` returns. `media/` contains `STEP_name.png` and `STEP_name.mp4`. If TensorFlow and TensorBoard are
    installed, `tensorboard/` also gets the scalars and images.

    A full disk does not stop a run: it is logged once, and scalars are written when there is space again.

    Args:
      workdir: folder of the run, created if missing.
      restored_step: the step the run continues from. Lines of later steps, which the run will repeat, are
        removed, as is a last line that a crash cut short.
    """

    def __init__(self, workdir: str | os.PathLike, *, restored_step: int = 0):
        self._enabled = jax.process_index() == 0
        self._warned_full = False
        self._tensorboard = None
        if not self._enabled:
            return
        self._workdir = pathlib.Path(workdir)
        self._media = self._workdir / "media"
        self._media.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(self._workdir) if row["step"] <= restored_step]
        self._row: dict[str, Any] = rows[-1] if rows else {"step": -1}
        lines = [_encode(row) for row in rows]
        files.write_bytes(path, b"".join(lines))
        # Unbuffered: after a failed write no data is left in a buffer to fail again or to be written twice.
        self._file = path.open("r+b", buffering=0)
        # The last line, and lines before it that are not on disk yet; they belong at `_start`.
        self._lines = lines[-1:] or [b""]
        self._end = sum(map(len, lines))
        self._start = self._end - len(self._lines[0])
        self._written = True
        self._tensorboard = _open_tensorboard(self._workdir / "tensorboard")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        if self._enabled:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes scalars (numbers, or arrays of one element) of a step.

        Several calls for one step write one line; the later value of a name replaces the earlier one.

        Raises:
          ValueError: the step is before the last one written.
        """
        if not self._enabled:
            return
        if step < self._row["step"]:
            raise ValueError(f"metrics of step {step} come after those of step {self._row['step']}")
        values = {name: np.asarray(value).item() for name, value in scalars.items()}
        same_step = step == self._row["step"]
        self._row = {**(self._row if same_step else {}), "step": int(step), "wall_time": time.time(), **values}
        if not same_step:
            # Lines that did not fit on the disk are written with the next ones.
            self._start, self._lines = (self._end, []) if self._written else (self._start, self._lines)
            self._lines.append(b"")
        self._lines[-1] = _encode(self._row)
        data = b"".join(self._lines)

        def write():
            self._file.seek(self._start)
            rest = data
            while rest:  # an unbuffered write may write only a part
                rest = rest[self._file.write(rest) :]
            self._file.truncate()  # last, so that a process killed before this has not lost the line

        self._written = self._unless_disk_full("metrics.jsonl", write)
        if self._written:
            self._end = self._start + len(data)
        if self._tensorboard:
            self._unless_disk_full("tensorboard", lambda: self._tensorboard.write_scalars(step, values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes uint8 [H, W, 3] to `media/STEP_name.png`."""
        if not self._enabled:
            return
        path = self._media_path(step, name, ".png")
        self._unless_disk_full(path, lambda: video.write_png(path, image))
        if self._tensorboard:
            self._unless_disk_full("tensorboard", lambda: self._tensorboard.write_images(step, {name: image}))

    def write_video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Writes uint8 [T, H, W, 3] at `fps` frames per second to `media/STEP_name.mp4`."""
        if self._enabled:
            path = self._media_path(step, name, ".mp4")
            self._unless_disk_full(path, lambda: video.write_video(path, frames, fps))

    def _media_path(self, step: int, name: str, suffix: str) -> pathlib.Path:
        return self._media / f"{step:08d}_{name.replace('/', '_')}{suffix}"

    def _unless_disk_full(self, what: str | os.PathLike, write: Callable[[], None]) -> bool:
        """Calls write; returns whether it succeeded. Raises all errors but a full disk."""
        try:
            write()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if not self._warned_full:
                logger.warning("disk full, cannot write %s in %s (%s); training continues", what, self._workdir, error)
            self._warned_full = True
            return False
        return True


def _encode(row: Mapping[str, Any]) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Complete rows of a workdir's metrics.jsonl; empty without the file.

    Raises:
      InputError: the file cannot be read.
    """
    path, rows = pathlib.Path(workdir) / "metrics.jsonl", []
    try:
        lines = path.read_bytes().splitlines() if path.is_file() else ()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue  # cut short by a crash, or being written
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < LAST_STEP:
            rows.append(row)
    return rows


def _open_tensorboard(path: pathlib.Path):
    """A clu SummaryWriter, or None if its requirements are missing or broken."""
    if any(importlib.util.find_spec(name) is None for name in ("clu", "tensorflow", "tensorboard")):
        return None
    try:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # or TensorFlow reserves the memory that JAX needs
        from clu.metric_writers import SummaryWriter

        return SummaryWriter(str(path))
    except Exception as error:  # a TensorFlow that does not match its protobuf or NumPy raises many kinds of errors
        logger.warning("no TensorBoard summaries: %s: %s", type(error).__name__, error)
        return None
