import contextlib
import importlib.machinery
import importlib.util
import io
import json
import logging
import pathlib
import resource
import struct
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larp_jax import cli
from larp_jax.errors import InputError
from larp_jax.runtime.progress import Progress
from larp_jax.training import trackers, writers


def rows(workdir):
    def refuse(constant):
        raise ValueError(f"{constant} is not strict JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(workdir):
    return [row["step"] for row in rows(workdir)]


def test_a_line_per_step_is_written_immediately(tmp_path):
    with writers.MetricWriter(tmp_path / "new" / "run") as writer:
        writer.write_scalars(0, {"loss": jnp.float32(0.5), "count": np.int64(3)})
        writer.write_scalars(10, {"loss": 0.25})
        (first, second) = rows(tmp_path / "new" / "run")  # before anything is closed
    assert first == {"step": 0, "wall_time": first["wall_time"], "loss": 0.5, "count": 3}
    assert second["loss"] == 0.25 and second["wall_time"] >= first["wall_time"]


def test_values_that_json_lacks_become_null(tmp_path):
    with writers.MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"a": float("nan"), "b": jnp.inf, "c": np.float32("-inf"), "d": 1.0})
    (row,) = rows(tmp_path)
    assert (row["a"], row["b"], row["c"], row["d"]) == (None, None, None, 1.0)


def test_calls_for_one_step_share_its_line(tmp_path):
    with writers.MetricWriter(tmp_path) as writer:
        writer.write_scalars(5, {"loss": 1.0, "a_name_that_makes_the_line_longer": 1})
        writer.write_scalars(5, {"loss": 2.0})
        writer.write_scalars(5, {"eval/psnr": 20.0})
        writer.write_scalars(6, {"loss": 3.0})
    first, second = rows(tmp_path)
    assert (first["step"], first["loss"], first["eval/psnr"]) == (5, 2.0, 20.0)
    assert (second["step"], second["loss"]) == (6, 3.0) and "eval/psnr" not in second


def test_steps_must_increase(tmp_path):
    with writers.MetricWriter(tmp_path) as writer:
        writer.write_scalars(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 4 .* step 5"):
            writer.write_scalars(4, {"loss": 1.0})


def test_resuming_drops_later_and_incomplete_lines(tmp_path):
    with writers.MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write_scalars(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with writers.MetricWriter(tmp_path, restored_step=20) as writer:
        assert steps(tmp_path) == [10, 20]
        writer.write_scalars(20, {"eval/psnr": 1.0})  # an evaluation repeated at the restored step
        writer.write_scalars(30, {"loss": -1.0})
    assert steps(tmp_path) == [10, 20, 30]
    assert rows(tmp_path)[1]["loss"] == 20.0 and rows(tmp_path)[1]["eval/psnr"] == 1.0
    assert rows(tmp_path)[2]["loss"] == -1.0
    writers.MetricWriter(tmp_path).close()  # a new run
    assert steps(tmp_path) == []


def test_a_full_disk_is_reported_once_and_lines_are_written_later(tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writers.MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"loss": 1.0})
        with caplog.at_level(logging.WARNING):
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, hard))
            try:
                writer.write_scalars(2, {"loss": 2.0})
                writer.write_scalars(3, {"loss": 3.0})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write_scalars(4, {"loss": 4.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    (record,) = (record for record in caplog.records if record.name == writers.__name__)
    others = [record.name for record in caplog.records if record.name != writers.__name__]
    assert others in ([], [trackers.__name__])  # TensorBoard's own files may have met the limit too
    assert "metrics.jsonl" in record.message and str(tmp_path) in record.message


def test_media_are_named_by_step(tmp_path):
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    with writers.MetricWriter(tmp_path) as writer:
        writer.write_image(120, "eval/reconstruction", frames[0])
        writer.write_video(120, "eval/reconstruction", frames, fps=8)
    names = sorted(path.name for path in (tmp_path / "media").iterdir())
    assert names == ["00000120_eval_reconstruction.mp4", "00000120_eval_reconstruction.png"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with writers.MetricWriter(tmp_path / "run") as writer:
        writer.write_scalars(1, {"loss": 1.0})
        writer.write_image(1, "image", np.zeros((16, 16, 3), np.uint8))
        writer.write_video(1, "video", np.zeros((2, 16, 16, 3), np.uint8), fps=8)
    assert not (tmp_path / "run").exists()
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        progress.update(loss=1.0)
    assert stream.getvalue() == ""


IMAGE = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)


def events(workdir):
    """The events for TensorBoard, of one start of the run after the other, read record by record with its checksums."""
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        rest = path.read_bytes()
        while rest:
            (length,) = struct.unpack("<Q", rest[:8])
            assert struct.unpack("<I", rest[8:12]) == (record_writer.masked_crc32c(rest[:8]),)
            data = rest[12 : 12 + length]
            assert struct.unpack("<I", rest[12 + length : 16 + length]) == (record_writer.masked_crc32c(data),)
            found.append(Event.FromString(data))
            rest = rest[16 + length :]
    return found


def test_tensorboard_gets_the_same_without_tensorflow(tmp_path):
    pytest.importorskip("tensorboardX")
    for restored_step in (0, 3):
        with writers.MetricWriter(tmp_path, restored_step=restored_step) as writer:
            writer.write_scalars(restored_step + 3, {"loss": jnp.float32(0.5), "eval/psnr": 20.0})
            writer.write_image(restored_step + 3, "samples", IMAGE)
    first, again = events(tmp_path)[:3], events(tmp_path)[3:]
    assert [event.file_version for event in (first[0], again[0])] == ["brain.Event:2"] * 2
    assert first[1].step == 3
    assert {value.tag: value.simple_value for value in first[1].summary.value} == {"loss": 0.5, "eval/psnr": 20}
    (value,) = first[2].summary.value
    assert (value.tag, value.image.height, value.image.width) == ("samples", 16, 24)
    assert value.image.encoded_image_string == (tmp_path / "media" / "00000003_samples.png").read_bytes()
    # TensorBoard forgets what it knows of steps that the run repeats
    assert (again[1].step, again[1].session_log.status) == (4, again[1].session_log.START)
    assert [event.step for event in again[2:]] == [6, 6]
    assert "tensorflow" not in sys.modules


class Service:
    """A stub of the packages of Weights & Biases and MLflow, which notes what it is asked for."""

    def __init__(self, monkeypatch):
        self.calls, self.fails, self.waits = [], set(), threading.Event()
        self.waits.set()
        run = types.SimpleNamespace(url="https://here", log=self.note("log"), finish=self.note("finish"))
        note, names = self.note, ("get_experiment_by_name", "log_batch", "log_artifact", "update_run", "set_terminated")

        class Client:
            tracking_uri = "https://there"

            def __init__(self):
                note("client")()
                for name in names:
                    setattr(self, name, note(name))

            def create_experiment(self, name):
                return note("create_experiment")(name) or "7"

            def create_run(self, *arguments, **options):
                note("create_run")(*arguments, **options)
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        entities = types.ModuleType("mlflow.entities")
        entities.Metric, entities.Param = (lambda *values: values), (lambda *values: values)
        packages = {
            "wandb": {
                "login": self.note("login"),
                "init": lambda **options: self.note("init")(**options) or run,
                "Settings": dict,
                "Image": lambda path: pathlib.Path(path).read_bytes(),
            },
            "mlflow": {"MlflowClient": Client, "entities": entities},
        }
        for name, contents in packages.items():
            package = types.ModuleType(name)
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
            package.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)

    def note(self, name):
        def call(*arguments, **options):
            self.waits.wait(10)
            if name in self.fails:
                raise ConnectionError("no network")
            self.calls.append((name, arguments, options))

        return call

    def named(self, name):
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.fixture
def service(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return Service(monkeypatch)


def report(workdir, tracker, restored_step=0, error=None):
    settings = {"steps": 9, "model": {"size": "tiny"}}
    with contextlib.suppress(KeyError), writers.MetricWriter(
        workdir, restored_step=restored_step, tracker=tracker, settings=settings
    ) as writer:
        writer.write_scalars(restored_step + 3, {"loss": jnp.float32(0.5)})
        writer.write_image(restored_step + 3, "eval/samples", IMAGE)
        if error:
            raise error


def test_weights_and_biases(tmp_path, service):
    report(tmp_path, "wandb")
    report(tmp_path, "wandb", restored_step=3, error=KeyError())
    report(tmp_path, "wandb")  # a new run
    first, again, other = (options for _, options in service.named("init"))
    assert first["id"] == again["id"] != other["id"] == json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    assert first["resume"] == "allow" and first["name"] == tmp_path.name and first["dir"] == str(tmp_path)
    assert first["project"] == "larp_jax" and first["config"] == {"steps": 9, "model": {"size": "tiny"}}
    png = (tmp_path / "media" / "00000003_eval_samples.png").read_bytes()
    logged = [(*arguments, options["step"]) for arguments, options in service.named("log")]
    assert logged[:2] == [({"loss": 0.5}, 3), ({"eval/samples": png}, 3)] and logged[2] == ({"loss": 0.5}, 6)
    assert [options["exit_code"] for _, options in service.named("finish")] == [0, 1, 0]


def test_mlflow(tmp_path, service):
    report(tmp_path, "mlflow")
    report(tmp_path, "mlflow", restored_step=3, error=KeyError())
    assert service.named("create_experiment") == [(("larp_jax",), {})]
    assert service.named("create_run") == [(("7",), {"run_name": tmp_path.name})]
    assert service.named("update_run") == [(("r1",), {"status": "RUNNING"})]  # the same run continues
    params, one, two = service.named("log_batch")
    assert params == (("r1",), {"params": [("steps", "9"), ("model.size", "tiny")]})
    for (arguments, options), step in ((one, 3), (two, 6)):
        ((name, value, _, found),) = options["metrics"]
        assert (arguments, name, value, found) == (("r1",), "loss", 0.5, step)
    assert [pathlib.Path(a[1]).name for a, _ in service.named("log_artifact")] == [
        "00000003_eval_samples.png", "00000006_eval_samples.png"
    ]  # fmt: skip
    assert [arguments for arguments, _ in service.named("set_terminated")] == [("r1", "FINISHED"), ("r1", "FAILED")]


@pytest.mark.parametrize(
    ("tracker", "call"), [("wandb", "init"), ("wandb", "log"), ("mlflow", "client"), ("mlflow", "log_batch")]
)
def test_a_service_that_fails_is_reported_once_and_training_continues(tmp_path, service, caplog, tracker, call):
    service.fails.add(call)
    with caplog.at_level(logging.WARNING):
        report(tmp_path, tracker)
    assert steps(tmp_path) == [3]
    (record,) = caplog.records
    assert f"{tracker} misses a part of this run (ConnectionError: no network); training continues" in record.message


@pytest.mark.slow
def test_a_service_that_hangs_does_not_hold_up_a_run(tmp_path, service, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    monkeypatch.setattr(trackers, "CALLS", 1)
    service.waits.clear()
    with caplog.at_level(logging.WARNING):
        report(tmp_path, "mlflow")
    service.waits.set()
    for thread in threading.enumerate():  # which would print what it is told into the next test
        if thread.name == "mlflow":
            thread.join(10)
    assert steps(tmp_path) == [3]
    (record,) = [record for record in caplog.records if "mlflow" in record.message]
    assert "mlflow misses a part of this run (it does not keep up)" in record.message


@pytest.mark.parametrize(("tracker", "packages"), [("wandb", "wandb pillow"), ("mlflow", "mlflow")])
def test_a_service_without_its_package_is_refused_first(tmp_path, monkeypatch, capsys, tracker, packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else find(name))
    train = ["train", "--config=tests/configs/tiny.py", f"--workdir={tmp_path / 'run'}", f"--config.tracker={tracker}"]
    assert cli.main([*train, "--config.data.train=folder:nowhere"]) == 2
    said = f"config.tracker={tracker!r} needs a package: pip install {packages}"
    assert capsys.readouterr().err == f"larp-jax: error: {said}\n"
    assert not list(tmp_path.iterdir())


def test_without_a_login_training_does_not_start(service, monkeypatch):
    service.fails.add("login")
    with pytest.raises(InputError, match="not logged in .*no network.* run wandb login, or set WANDB_API_KEY"):
        trackers.check("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("wandb")
    trackers.check("mlflow")
    trackers.check("none")


def test_progress_in_a_log_is_plain_lines(monkeypatch):
    stream = io.StringIO()
    with Progress(
        12, description="train", initial=2, clips_per_unit=8, interval=3600, stream=stream
    ) as progress:
        for step in range(10):
            progress.update(loss=1 / (step + 1))
    first, last = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert first.startswith("train:  17% 2/12")
    assert "12/12" in last and "loss=0.1" in last and "clips/s" in last
