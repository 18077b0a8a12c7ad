"""Metrics, images and videos of a run, by step."""

import concurrent.futures
import errno
import json
import logging
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from larp_jax import files, storage
from larp_jax.data import video
from larp_jax.errors import InputError, reason
from larp_jax.files import parse_json
from larp_jax.training import trackers

logger = logging.getLogger(__name__)

LAST_STEP = 2**53  # larger integers are not exact as floats, which charts need
METRICS = "metrics.jsonl"
UPLOAD_EVERY = 30.0  # seconds between uploads of metrics.jsonl to a bucket
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class MetricWriter:
    """Writes the scalars and media of a run into its workdir; only the process with index 0 writes anything.

    `metrics.jsonl` contains one strict JSON object per line: `step`, `wall_time` (seconds since the epoch) and every
    scalar of that step; NaN and infinities become null. Steps increase from line to line, and a line is on disk when
    `write_scalars` returns. `media/` contains `STEP_name.png` and `STEP_name.mp4`. Scalars and images also go to
    TensorBoard and to the service that is chosen; see `larp_jax.training.trackers`.

    A full disk does not stop a run: it is logged once, and scalars are written when there is space again. In a bucket,
    files are written in the background, `metrics.jsonl` as a whole every `UPLOAD_EVERY` seconds and by `flush`; a
    failure is logged once, and lines are written with the next ones.

    Args:
      workdir: folder of the run, created if missing.
      restored_step: the step the run continues from. Lines of later steps, which the run will repeat, are
        removed, as is a last line that a crash cut short.
      tracker: `none`, `wandb` or `mlflow`.
      settings: the recipe, for the tracker.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        restored_step: int = 0,
        tracker: str = "none",
        settings: Mapping[str, Any] | None = None,
    ):
        self._enabled = jax.process_index() == 0
        self._warned = False
        if not self._enabled:
            return
        self._workdir = files.any_path(workdir)
        self._media = self._workdir / "media"
        files.make_folder(self._media)
        rows = [row for row in read_metrics(self._workdir) if row["step"] <= restored_step]
        self._row: dict[str, Any] = rows[-1] if rows else {"step": -1}
        lines = _RemoteLines if storage.is_remote(self._workdir) else _LocalLines
        self._lines = lines(self._workdir / METRICS, [_encode(row) for row in rows])
        # In a bucket, media are written by one thread in the order in which they come.
        self._background = concurrent.futures.ThreadPoolExecutor(1) if storage.is_remote(self._workdir) else None
        self._reporters = trackers.start(self._workdir, restored_step, tracker, settings or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close(failed=exception[0] is not None)

    def close(self, *, failed: bool = False) -> None:
        """Closes the files, after everything is written or has failed; `failed` if an error ends the run."""
        if not self._enabled:
            return
        if self._background:
            self._background.shutdown()
            self._tolerate(METRICS, self.flush)
        self._lines.close()
        for reporter in self._reporters:
            reporter.close(failed=failed)

    def flush(self) -> None:
        """Returns when all lines written so far are stored. Raises the error if that fails."""
        if self._enabled:
            self._lines.flush()

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
        self._lines.put(_encode(self._row), replace=same_step)
        self._write(METRICS, self._lines.write)
        for reporter in self._reporters:
            reporter.put(lambda tracker: tracker.write_scalars(step, values))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes uint8 [H, W, 3] to `media/STEP_name.png`."""
        if not self._enabled:
            return
        path = self._media_path(step, name, ".png")
        png = video.encode_png(image)
        self._write(path, lambda: files.write_bytes(path, png))
        for reporter in self._reporters:
            reporter.put(lambda tracker: tracker.write_image(step, name, png))

    def write_video(self, step: int, name: str, frames: np.ndarray, fps: float) -> None:
        """Writes uint8 [T, H, W, 3] at `fps` frames per second to `media/STEP_name.mp4`."""
        if self._enabled:
            path = self._media_path(step, name, ".mp4")
            self._write(path, lambda: video.write_video(path, frames, fps))

    def _media_path(self, step: int, name: str, suffix: str) -> pathlib.Path:
        return self._media / f"{step:08d}_{name.replace('/', '_')}{suffix}"

    def _write(self, what: str | os.PathLike, write: Callable[[], None]) -> None:
        if self._background:
            self._background.submit(self._tolerate, what, write)
        else:
            self._tolerate(what, write)

    def _tolerate(self, what: str | os.PathLike, write: Callable[[], None]) -> None:
        """Calls write. The run continues after a full disk and after any failure of a bucket."""
        try:
            write()
        except Exception as error:
            remote = self._background is not None
            if not remote and not (isinstance(error, OSError) and error.errno in DISK_FULL):
                raise
            if not self._warned:
                cause = f"({reason(error)})" if remote else f"in {self._workdir} ({error})"
                start = "" if remote else "disk full, "
                logger.warning("%scannot write %s %s; training continues", start, what, cause)
            self._warned = True


class _LocalLines:
    """The lines of a file on a disk. Those that do not fit are written with the next ones."""

    def __init__(self, path: pathlib.Path, lines: list[bytes]):
        files.write_bytes(path, b"".join(lines))
        # Unbuffered: after a failed write no data is left in a buffer to fail again or to be written twice.
        self._file = path.open("r+b", buffering=0)
        # The last line, and lines before it that are not on disk yet; they belong at `_start`.
        self._lines = lines[-1:] or [b""]
        self._end = sum(map(len, lines))
        self._start = self._end - len(self._lines[0])
        self._written = True

    def put(self, line: bytes, *, replace: bool) -> None:
        """Adds a line, or replaces the last one."""
        if not replace:
            self._start, self._lines = (self._end, []) if self._written else (self._start, self._lines)
            self._lines.append(b"")
        self._lines[-1] = line
        self._written = False

    def write(self) -> None:
        """Writes the lines that are not on disk yet."""
        data = b"".join(self._lines)
        self._file.seek(self._start)
        rest = data
        while rest:  # an unbuffered write may write only a part
            rest = rest[self._file.write(rest) :]
        self._file.truncate()  # last, so that a process killed before this has not lost the line
        self._written, self._end = True, self._start + len(data)

    def flush(self) -> None:
        """Nothing is left to write."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _RemoteLines:
    """The lines of an object, which is always written as a whole: objects cannot grow."""

    def __init__(self, path: pathlib.Path, lines: list[bytes]):
        self._path, self._lines = path, lines
        self._lock = threading.Lock()
        self.flush()

    def put(self, line: bytes, *, replace: bool) -> None:
        """Adds a line, or replaces the last one."""
        self._lines[len(self._lines) - replace :] = [line]

    def write(self) -> None:
        """Writes all lines, unless that was done a moment ago."""
        if time.monotonic() - self._written >= UPLOAD_EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes all lines."""
        with self._lock:  # an earlier version must not replace a later one
            files.write_bytes(self._path, b"".join(self._lines))
            self._written = time.monotonic()

    def close(self) -> None:
        """There is nothing to close."""


def _encode(row: Mapping[str, Any]) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Complete rows of a workdir's metrics.jsonl; empty without the file.

    Raises:
      InputError: the file cannot be read.
    """
    path, rows = files.any_path(workdir) / METRICS, []
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
