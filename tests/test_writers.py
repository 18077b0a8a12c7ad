import io
import json
import logging
import resource
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larp_jax.runtime.progress import Progress
from larp_jax.training import writers


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
    (record,) = caplog.records
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


def test_tensorboard_gets_the_same_and_tensorflow_sees_no_gpu(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, logdir):
            calls.append(("open", logdir))

        def write_scalars(self, step, scalars):
            calls.append(("scalars", step, scalars))

        def close(self):
            calls.append(("close",))

    def module(name, **attributes):
        fake = types.ModuleType(name)
        fake.__spec__ = types.SimpleNamespace(name=name)
        fake.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, fake)

    config = types.SimpleNamespace(set_visible_devices=lambda devices, kind: calls.append(("hide", devices, kind)))
    module("tensorflow", config=config)
    module("tensorboard")
    module("clu.metric_writers", SummaryWriter=SummaryWriter)
    with writers.MetricWriter(tmp_path) as writer:
        writer.write_scalars(3, {"loss": jnp.float32(0.5)})
    assert calls == [
        ("hide", [], "GPU"),
        ("open", str(tmp_path / "tensorboard")),
        ("scalars", 3, {"loss": 0.5}),
        ("close",),
    ]


def test_a_broken_tensorflow_disables_only_tensorboard(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))  # has no `config`
    with caplog.at_level(logging.WARNING), writers.MetricWriter(tmp_path) as writer:
        writer.write_scalars(1, {"loss": 1.0})
    assert steps(tmp_path) == [1]
    assert "no TensorBoard summaries: AttributeError" in caplog.text


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
