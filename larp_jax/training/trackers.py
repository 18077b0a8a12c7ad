"""Services that a run also reports to: TensorBoard, Weights & Biases and MLflow, through one small interface.

`metrics.jsonl` and `media/` are complete without them. Each is called in a thread of its own, in order, so that one
that is slow or fails neither delays nor ends training: a failure is logged once, and what it concerns is not sent
again. (MLflow repeats requests for about two minutes; Weights & Biases keeps what it cannot send in its own folder.)
"""

import importlib.util
import logging
import os
import pathlib
import queue
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from larp_jax import files, storage
from larp_jax.config import flat
from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

PACKAGES = {"wandb": "wandb pillow", "mlflow": "mlflow"}  # what pip installs for the values of `config.tracker`
RUNS = "tracking.json"  # in the workdir: the id of the run at each service
PROJECT = "larp_jax"  # of Weights & Biases, and experiment of MLflow, unless an environment variable names another
CALLS = 1000  # that may wait for a service; later ones are dropped
PATIENCE = 60.0  # seconds that the end of a run waits for a service
UPLOAD_EVERY = 30.0  # seconds between uploads of event files to a bucket
PARAMETERS = 100  # MLflow takes that many at a time


class Tracker(Protocol):
    """What a service does with a run."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes scalars of a step; a later call for the same step may add some."""

    def write_image(self, step: int, name: str, png: bytes) -> None:
        """Takes a picture of a step, the bytes of a PNG file."""

    def close(self, failed: bool) -> None:
        """Ends the run, because training ended or failed."""


def check(name: str) -> None:
    """Checks before any work that a service can be used.

    Args:
      name: `config.tracker`: `none`, `wandb` or `mlflow`.

    Raises:
      InputError: its package is not installed, or nobody is logged in.
    """
    if name not in PACKAGES:
        return
    if not _is_installed(name):
        raise InputError(f"config.tracker={name!r} needs a package: pip install {PACKAGES[name]}")
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        import wandb

        try:
            wandb.login(timeout=int(PATIENCE), verify=False)  # asks on a terminal
        except Exception as error:  # of several types, without a login or with a key of the wrong form
            raise InputError(
                f"config.tracker='wandb': not logged in to Weights & Biases ({reason(error)}); run wandb login, or set"
                " WANDB_API_KEY, or WANDB_MODE=offline"
            ) from None


def start(workdir: pathlib.Path, restored_step: int, name: str, settings: Mapping[str, Any]) -> list["Reporter"]:
    """Opens the services of a run: TensorBoard if tensorboardX is installed, and the one that is chosen.

    Args:
      workdir: folder of the run.
      restored_step: the step it continues from. The run of a service is continued too, unless this is 0.
      name: `config.tracker`.
      settings: the recipe, which the services record.
    """
    reporters = []
    if _is_installed("tensorboardX"):
        reporters.append(Reporter("TensorBoard", lambda: TensorBoard(workdir / "tensorboard", restored_step)))
    if name in PACKAGES:
        open_service = {"wandb": WeightsAndBiases, "mlflow": MLflow}[name]
        reporters.append(Reporter(name, lambda: open_service(workdir, restored_step, settings)))
    return reporters


class Reporter:
    """Calls a tracker in a thread. Nothing here raises or waits, except `close`, which waits for `PATIENCE` seconds.

    Args:
      name: of the service, for messages.
      open_tracker: called in the thread.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]):
        self._name, self._open, self._warned = name, open_tracker, False
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(CALLS)
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Tracker], None]) -> None:
        """Calls a function with the tracker, after those that came before."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn("it does not keep up")

    def close(self, *, failed: bool) -> None:
        """Ends the run of the service, after everything is sent."""
        self._failed, end = failed, time.monotonic() + PATIENCE
        try:
            self._calls.put(None, timeout=PATIENCE)
            self._thread.join(max(0.0, end - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn("it does not answer")

    def _run(self) -> None:
        tracker = self._attempt(self._open)
        while (call := self._calls.get()) is not None:
            if tracker is not None:
                self._attempt(call, tracker)
        if tracker is not None:
            self._attempt(tracker.close, self._failed)

    def _attempt(self, call: Callable, *arguments):
        try:
            return call(*arguments)
        except Exception as error:  # of any kind: the packages, their servers and the network are not ours
            self._warn(f"{type(error).__name__}: {reason(error)}")
            return None

    def _warn(self, cause: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s misses a part of this run (%s); training continues", self._name, cause)


class TensorBoard:
    """Event files for TensorBoard, one for each start of a run; a tracker.

    tensorboardX writes them with protobuf alone. The writer of clu needs TensorFlow, which takes hundreds of megabytes
    and seconds to import, reserves the memory of GPUs, and ties its own versions of protobuf and NumPy. Its class
    `EventsWriter` is the one without a thread and a queue, so that errors of the disk are raised here.

    Args:
      folder: created if missing; in a bucket, the file is written on this machine and uploaded.
      restored_step: TensorBoard hides events of later steps, which the run repeats.
    """

    def __init__(self, folder: pathlib.Path, restored_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._temporary = tempfile.mkdtemp(prefix="larp-") if storage.is_remote(folder) else None
        self._folder, self._uploaded = files.make_folder(folder), time.monotonic()
        local = pathlib.Path(self._temporary or folder)
        # Its name contains the second and the host, which two starts may share.
        self._writer = EventsWriter(str(local / "events"), f".{secrets.token_hex(4)}")
        if restored_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(restored_step + 1, session_log=start)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars; see `Tracker`."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step, summary=self._summary(value=values))

    def write_image(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture; see `Tracker`."""
        height, width = (int.from_bytes(png[start : start + 4], "big") for start in (20, 16))  # of its header
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def _write(self, step: int, **content) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._writer.flush()
        if self._temporary and time.monotonic() - self._uploaded >= UPLOAD_EVERY:
            self._upload()

    def _upload(self) -> None:
        for path in pathlib.Path(self._temporary).iterdir():
            storage.upload(path, self._folder / path.name)
        self._uploaded = time.monotonic()

    def close(self, failed: bool) -> None:
        """Closes the file; see `Tracker`."""
        self._writer.close()
        if self._temporary:
            self._upload()
            shutil.rmtree(self._temporary, ignore_errors=True)


class WeightsAndBiases:
    """A run at Weights & Biases; a tracker. Project, server and mode come from WANDB_ environment variables."""

    def __init__(self, workdir: pathlib.Path, restored_step: int, settings: Mapping[str, Any]):
        import wandb

        run = _known(workdir, "wandb", restored_step) or secrets.token_hex(4)
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=files.absolute(workdir).name,
            id=run,
            resume="allow",
            config=dict(settings),
            dir=os.environ.get("WANDB_DIR") or (None if storage.is_remote(workdir) else str(workdir)),
            settings=wandb.Settings(console="off"),  # the command line has its own handling of the terminal
        )
        _remember(workdir, "wandb", run)
        logger.info("Weights & Biases: run %s %s", run, self._run.url or "")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends scalars; see `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def write_image(self, step: int, name: str, png: bytes) -> None:
        """Sends a picture; see `Tracker`."""
        with tempfile.TemporaryDirectory(prefix="larp-") as folder:
            path = pathlib.Path(folder, "image.png")
            path.write_bytes(png)
            self._run.log({name: self._image(str(path))}, step=step)

    def close(self, failed: bool) -> None:
        """Ends the run; see `Tracker`."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run at MLflow; a tracker. The server and the experiment come from MLFLOW_ environment variables."""

    def __init__(self, workdir: pathlib.Path, restored_step: int, settings: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        run = _known(workdir, "mlflow", restored_step)
        if run is not None:
            self._client.update_run(run, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=files.absolute(workdir).name).info.run_id
            params = [Param(key, str(value)) for key, value in flat(settings)]
            for first in range(0, len(params), PARAMETERS):
                self._client.log_batch(run, params=params[first : first + PARAMETERS])
            _remember(workdir, "mlflow", run)
        self._run = run
        logger.info("MLflow: run %s at %s", run, self._client.tracking_uri)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends scalars; see `Tracker`."""
        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[self._metric(k, float(v), now, step) for k, v in scalars.items()])

    def write_image(self, step: int, name: str, png: bytes) -> None:
        """Sends a picture; see `Tracker`."""
        with tempfile.TemporaryDirectory(prefix="larp-") as folder:
            path = pathlib.Path(folder, f"{step:08d}_{name.replace('/', '_')}.png")
            path.write_bytes(png)
            self._client.log_artifact(self._run, str(path), "media")

    def close(self, failed: bool) -> None:
        """Ends the run; see `Tracker`."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a folder wandb/ of runs also counts as a package, without


def _known(workdir: pathlib.Path, service: str, restored_step: int) -> str | None:
    """The id of the run that is continued."""
    run = files.json_object(workdir / RUNS).get(service) if restored_step else None
    return run if isinstance(run, str) else None


def _remember(workdir: pathlib.Path, service: str, run: str) -> None:
    files.write_json(workdir / RUNS, files.json_object(workdir / RUNS) | {service: run})
