"""The command line: help, mistakes, and the commands that have no tests of their own."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from network_weights import write_lpips
from safetensors.numpy import load_file
from test_evaluators import Stub

import larp_jax
from larp_jax import cli
from larp_jax.cli import app
from larp_jax.cli.recipe import load_recipe
from larp_jax.config import to_dict
from larp_jax.errors import InputError
from larp_jax.tools import doctor
from larp_jax.weights import networks
from larp_jax.weights.checkpoint import load, write_imported

CONFIG = str(pathlib.Path(__file__).parent / "configs" / "tiny.py")
PAIR = ["--checkpoint=absent", "--tokenizer=absent"]
# The fewest arguments of each command; nothing that they name exists, except the recipe.
ARGUMENTS = {
    "train": ["--config", CONFIG, "--workdir=output"],
    "evaluate": ["--checkpoint=absent", "--data=moving_shapes"],
    "analyze": ["--checkpoint=absent", "--data=moving_shapes", "--output=output"],
    "reconstruct": ["--checkpoint=absent", "--input=moving_shapes", "--output=output"],
    "tokenize": ["--checkpoint=absent", "--input=moving_shapes", "--output=output"],
    "detokenize": ["--checkpoint=absent", "--input=x", "--output=output"],
    "allocate": ["--checkpoint=absent", "--data=moving_shapes", "--output=output"],
    "features": ["--config", CONFIG, "--output=output"],
    "sample": [*PAIR, "--output=output"],
    "predict": [*PAIR, "--input=x", "--output=output"],
    "stream": [*PAIR, "--frames=8", "--output=output"],
    "export": ["--checkpoint=absent", "--format=codebook-npz", "--output=output"],
    "import": ["--source=absent", "--output=output"],
    "prepare": ["--input=absent", "--output=output"],
    "experiment": ["smoke", "--workdir=output"],
    "plan": ["--config", CONFIG, "--devices=2"],
    "benchmark": ["train", "--config", CONFIG],
    "report": ["--workdir=absent"],
    "demo": ["--checkpoint=absent"],
    "doctor": [],
}


@pytest.mark.parametrize("command", app.parsers()[1])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  larp-jax {command}" in capsys.readouterr().out
    assert app.parse([command, *ARGUMENTS[command]]).command == command


def test_help_is_instant():
    code = "import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); from larp_jax import cli; "
    code += "cli.main(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    assert re.findall(r"^    (\w+)", result.stdout, flags=re.MULTILINE) == list(app.parsers()[1])


def fails(arguments, capsys, code=2):
    """The one line of an error."""
    assert cli.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("larp-jax: error: ")
    return lines[0].removeprefix("larp-jax: error: ")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["--config.model.num_token=4"],
            "config.model.num_token is not a setting; did you mean config.model.num_tokens?",
        ),
        (["--config.modell.num_tokens=4"], "config.modell is not a setting; did you mean config.model?"),
        (["--config.steps.x=4"], "config.steps is a single value and has no config.steps.x"),
        (["--config.steps=many"], "config.steps=many"),
        (["--config.steps=1.5"], "config.steps=1.5"),
        (["--config.data.flip=maybe"], "config.data.flip=maybe"),
        (["--config.precision=float16"], "precision='float16' is not known; choose one of float32, bfloat16"),
        (["--config.model=5"], "config.model"),
        (["--config.model.resolution=36"], "model.resolution=36 is not divisible by model.patch_size=8"),
        (["--config.seed=-1"], "seed must be an integer from 0 to 2^64 - 1, got -1"),
        (["--config.seed=18446744073709551616"], "seed must be an integer from 0 to 2^64 - 1"),
        (["--config.optim.multipliers.tokenizer/encoder=fast"], "multipliers.tokenizer/encoder=fast must be NAME=NUM"),
        (["--config.optim.multipliers.prior=nan"], "multipliers.prior=nan must be NAME=NUMBER"),
        (["--config.optim.multipliers.=1"], "must be NAME=NUMBER"),
        (
            ["--config.optim.multipliers.tokenizer/encodr=1"],
            "is not a parameter or a prefix of one; did you mean tokeniz",
        ),
        (["--config.optim.multiplierz.prior=1"], "did you mean config.optim.multipliers?"),
        (["--config.data.train=moving_shape"], "did you mean 'moving_shapes'?"),
        (["--config.data.train=folder:/does/not/exist"], "does not exist"),
        (["--config.steps"], "config.steps"),
        (["--steps=4"], "--steps"),
        (["--configure.steps=4"], "--configure.steps"),
        (["surplus"], "surplus"),
    ],
)
def test_settings_that_are_wrong(overrides, message, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert message in fails(["train", "--config", CONFIG, "--workdir", str(workdir), *overrides], capsys)
    assert not workdir.exists()


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "is not a file; give a recipe such as configs/quickstart.py"),
        ("", "it does not define get_config()"),
        ("def get_config(): return {}", "must return a ConfigDict, not a dict"),
        ("def get_config(:", "SyntaxError: invalid syntax (recipe.py, line 1)"),
        ("import nothing_of_the_kind", "line 1: ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("def get_config():\n  raise ValueError('two\\nlines')", "line 2: ValueError: two lines"),
        (
            "from larp_jax.config import default_recipe\n"
            "def get_config():\n  c = default_recipe()\n  c.stepz = 3\n  return c",
            "config.stepz is not a setting; did you mean config.steps?",
        ),
    ],
)
def test_config_files_that_are_wrong(source, message, tmp_path, capsys):
    path = tmp_path / "recipe.py"
    if source is not None:
        path.write_text(source)
    assert message in fails(["train", "--config", str(path), "--workdir", str(tmp_path / "run")], capsys)


def test_a_variant(tmp_path, capsys):
    arguments = app.parse(["benchmark", "data", "--config", f"{CONFIG}:plain", "--config.steps", "9"])
    recipe = load_recipe(arguments)
    assert (recipe.loss.prior_weight, recipe.steps) == (0.0, 9)
    arguments = app.parse(["benchmark", "data", "--config", CONFIG, "--noconfig.data.flip", "--config.mesh.data=-1"])
    assert load_recipe(arguments).data.flip is False


def test_names_with_slashes_and_dots_and_large_seeds():
    names = ["--config.optim.multipliers.tokenizer/encoder=0.01", "--config.optim.multipliers.prior=2"]
    names += ["--config.optim.multipliers.tokenizer.decoder.head", "0.5", "--config.optim.multipliers.prior=3"]
    names += ["--config.seed=9223372036854775808", "--config.steps=9"]
    recipe = load_recipe(app.parse(["benchmark", "data", "--config", CONFIG, *names]))
    assert recipe.optim.multipliers == {"prior": 3.0, "tokenizer/encoder": 0.01, "tokenizer/decoder/head": 0.5}
    assert (recipe.seed, recipe.steps) == (2**63, 9)


def test_seeds_of_sampling(capsys):
    sample = ["sample", "--checkpoint=g", "--tokenizer=t", "--output=o"]
    assert app.parse([*sample, "--seed=18446744073709551615"]).seed == 2**64 - 1
    assert "is above 2^64 - 1" in fails([*sample, "--seed=18446744073709551616"], capsys)
    assert "is not an integer of at least 0" in fails([*sample, "--seed=-1"], capsys)


def test_a_missing_device_is_reported_before_anything_else(trained, tmp_path, capsys, monkeypatch):
    def devices(*args):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.chdir(tmp_path)
    commands = ARGUMENTS.keys() - {"doctor", "plan", "prepare", "report"}  # these need none
    said = RuntimeError("Unable to initialize backend 'cuda': no device (set JAX_PLATFORMS='')")
    for error in (said, AssertionError()):
        for name in commands:
            line = fails([name, *ARGUMENTS[name]], capsys)
            assert line.startswith("JAX has no device to compute on") and "JAX_PLATFORMS=cuda asks for what is" in line
            assert ("Unable to initialize backend 'cuda': no device)" in line) == (error is said)
        with pytest.raises(InputError, match="JAX has no device"):
            larp_jax.load_tokenizer(trained)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("command", [name for name, given in ARGUMENTS.items() if "--checkpoint=absent" in given])
def test_a_missing_checkpoint(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint in absent" in fails([command, *ARGUMENTS[command]], capsys)
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_wrong(trained, capsys, tmp_path):
    evaluate = ["evaluate", "--checkpoint", str(trained), "--data", "moving_shapes:test"]
    assert "choose from 'train'" in fails(["trian"], capsys)
    assert "COMMAND" in fails([], capsys)
    assert "--checkpoint" in fails(["evaluate"], capsys)
    assert "fid is not known; choose from psnr, ssim, lpips, rfvd, usage, latents, codes, prior" in fails(
        [*evaluate, "--metrics=psnr,fid"], capsys
    )
    absent = str(tmp_path / "absent.safetensors")
    for kind, metric in (("lpips", "lpips"), ("i3d", "rfvd")):
        message = fails([*evaluate, f"--metrics={metric}", f"--{kind}", absent], capsys)
        assert f"no weights of {kind} at {absent}" in message and f"larp-jax import --kind {kind}" in message
    assert "defined for clips of 16x128x128, not 8x32x32" in fails([*evaluate, "--protocol=larp_ucf101"], capsys)
    assert "is for --protocol held_out" in fails([*evaluate, "--training-data=moving_shapes"], capsys)
    same = [*evaluate[:-1], "moving_shapes:train", "--protocol=held_out"]
    assert "is also in the training data moving_shapes" in fails(same, capsys)
    assert "must be at least 1" in fails([*evaluate, "--batch-size=0"], capsys)
    assert "is not an integer of at least 0" in fails([*evaluate, "--max-clips=-1"], capsys)
    assert "has no split" in fails(["evaluate", "--checkpoint", str(trained), "--data", "moving_shapes:x"], capsys)
    (tmp_path / "empty").mkdir()
    spec = f"folder:{tmp_path / 'empty'}"
    assert "contains no video file" in fails(["evaluate", "--checkpoint", str(trained), "--data", spec], capsys)
    train = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "run"), f"--config.data.train={spec}"]
    assert "contains no video file" in fails(train, capsys)


def test_failures_while_running(capsys, monkeypatch):
    def fail(error):
        def report():
            raise error

        monkeypatch.setattr(doctor, "report", report)

    fail(OSError(28, "No space left on device", "x.npz"))
    assert "No space left on device: 'x.npz'" in fails(["doctor"], capsys, code=1)
    fail(KeyError("two\nlines"))
    assert "KeyError: " in fails(["doctor"], capsys, code=1)
    fail(KeyboardInterrupt())
    assert fails(["doctor"], capsys, code=1) == "interrupted"
    monkeypatch.setattr(doctor, "report", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert fails(["doctor"], capsys, code=1) == "stopped by SIGTERM"
    fail(ZeroDivisionError())
    assert cli.main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupted_process_does_not_wait_for_its_threads():
    code = """
import os, signal, sys, threading, time
from larp_jax import cli
from larp_jax.tools import doctor

def report():
    threading.Thread(target=time.sleep, args=[600]).start()
    os.kill(os.getpid(), signal.SIGTERM)

doctor.report, sys.argv = report, ["larp-jax", "doctor"]
sys.exit(cli.main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (1, "larp-jax: error: stopped by SIGTERM\n")


def test_evaluate(trained, tokenizer, tmp_path, capsys):
    output = tmp_path / "new" / "evaluation.json"
    arguments = ["evaluate", "--checkpoint", str(trained), "--data", "moving_shapes:test", "--output", str(output)]
    assert cli.main([*arguments, "--max-clips=10", "--batch-size=3"]) == 0
    assert "psnr_mean_clip" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert {"psnr", "psnr_mean_clip", "ssim", "usage", "perplexity"} <= written["metrics"].keys()
    protocol = written["protocol"]
    assert (protocol["clips"], protocol["step"], protocol["data"]) == (10, 6, "moving_shapes:test")
    assert protocol["fingerprint"] == tokenizer.fingerprint
    assert set(protocol["definitions"]) - {"clips"} == written["metrics"].keys()

    assert len(written["entropy_by_position"]) == 8
    assert np.mean(written["entropy_by_position"]) == pytest.approx(written["metrics"]["position_entropy"])

    assert cli.main([*arguments, "--metrics", "psnr", "--protocol=held_out"]) == 0
    written = json.loads(output.read_text())
    assert set(written["metrics"]) == {"psnr", "psnr_mean_clip"}
    held_out = {"protocol": "held_out", "training_data": "moving_shapes", "videos_left_out_as_trained_on": 0}
    assert held_out.items() <= written["protocol"].items()


@pytest.mark.slow
def test_evaluate_with_other_networks(trained, reference_dir, tmp_path, capsys, monkeypatch, narrow_vgg):
    weights = write_lpips(tmp_path, reference_dir)
    lpips = str(tmp_path / "lpips.safetensors")
    import_ = ["import", "--kind=lpips", "--source", str(weights[0]), "--heads", str(weights[1]), "--output", lpips]
    assert cli.main(import_) == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # in place of I3D, which needs longer clips
    monkeypatch.setattr(networks, "load_i3d", lambda path: Stub())
    monkeypatch.setattr(networks, "identify", lambda kind, path, known=networks.identify: (
        known(kind, path) if kind == "lpips" else {"sha256": "of a stub"}
    ))  # fmt: skip
    output = tmp_path / "evaluation.json"
    arguments = ["evaluate", "--checkpoint", str(trained), "--data=moving_shapes:test", "--output", str(output)]
    arguments += ["--lpips", lpips, "--max-clips=8"]
    assert cli.main([*arguments, "--metrics=lpips,rfvd"]) == 0
    assert "biased" not in capsys.readouterr().err  # more clips than the stub has features
    written = json.loads(output.read_text())
    assert written["metrics"].keys() == {"lpips", "rfvd"}
    assert all(value > 0.0 for value in written["metrics"].values())
    protocol = written["protocol"]
    assert set(protocol["lpips"]["sources"]) == {"vgg16.safetensors", "heads.safetensors"}
    assert len(protocol["lpips"]["sha256"]) == 64
    wanted = {"i3d": {"sha256": "of a stub"}, "covariance": "population", "split": "test", "clips": 8}
    assert wanted.items() <= protocol.items()

    assert cli.main([*arguments, "--metrics=rfvd"]) == 0
    assert "I3D features of 8 real clips: taken from" in capsys.readouterr().err
    assert json.loads(output.read_text())["metrics"]["rfvd"] == written["metrics"]["rfvd"]


def test_a_checkpoint_without_a_prior_and_one_of_nans(trained, tmp_path, capsys):
    found = load(trained)
    tokenizer = {"tokenizer": found.params["tokenizer"]}
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), tokenizer)
    for name, params in (("plain", tokenizer), ("broken", broken)):
        write_imported(tmp_path / name, to_dict(found.recipe), params)
    evaluate = ["evaluate", "--data=moving_shapes:test", "--max-clips=8", "--checkpoint"]
    message = _fails_last([*evaluate, str(tmp_path / "plain"), "--metrics=prior"], capsys)
    assert "prior does not apply to this checkpoint" in message
    message = _fails_last([*evaluate, str(tmp_path / "broken"), "--metrics=psnr"], capsys)
    assert "psnr: no finite number" in message


def test_codebooks(trained, tokenizer, tmp_path, capsys):
    checkpoint = ["--checkpoint", str(trained)]
    assert cli.main(["export", *checkpoint, "--format=codebook-npz", f"--output={tmp_path / 'c.npz'}"]) == 0
    with np.load(tmp_path / "c.npz") as file:
        assert np.array_equal(file["codebook"], tokenizer.codebook)
        manifest = json.loads(file["manifest"].tobytes())
    assert (manifest["step"], manifest["fingerprint"]) == (6, tokenizer.fingerprint)
    assert sum(manifest["usage_counts"]) == 64
    path = tmp_path / "c.safetensors"
    assert cli.main(["export", *checkpoint, "--format=codebook-safetensors", f"--output={path}"]) == 0
    from safetensors.numpy import load_file

    assert np.array_equal(load_file(path)["codebook"], tokenizer.codebook)
    assert "invalid choice: 'onnx'" in _fails_last(["export", *checkpoint, "--format=onnx", "--output=x"], capsys)


def _fails_last(arguments, capsys):
    assert cli.main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_to_hugging_face_and_back(trained, tokenizer, tmp_path, capsys):
    there, back = tmp_path / "hf", tmp_path / "imported"
    assert cli.main(["export", "--checkpoint", str(trained), "--format=huggingface", f"--output={there}"]) == 0
    assert larp_jax.load_tokenizer(there).fingerprint == tokenizer.fingerprint
    assert cli.main(["import", f"--source={there}", f"--output={back}"]) == 0
    imported = larp_jax.load_tokenizer(back)
    assert imported.fingerprint == tokenizer.fingerprint
    codes = np.arange(16).reshape(2, 8)
    np.testing.assert_allclose(imported.decode(codes), tokenizer.decode(codes), atol=1e-6)
    assert "already exists and is not empty" in _fails_last(["import", f"--source={there}", f"--output={back}"], capsys)
    assert "already exists" in _fails_last(
        ["export", "--checkpoint", str(trained), "--format=huggingface", f"--output={there}"], capsys
    )


@pytest.mark.parametrize("name", ["ar_class", "ar_frame_prediction"])
def test_generators_are_imported_and_exported_unchanged(name, reference_dir, tmp_path, capsys):
    source, there, back = reference_dir / name, tmp_path / "imported", tmp_path / "exported"
    assert cli.main(["import", f"--source={source}", f"--output={there}"]) == 0
    assert cli.main(["export", f"--checkpoint={there}", "--format=huggingface", f"--output={back}"]) == 0
    tensors, again = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert tensors.keys() == again.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(tensors[tensor], again[tensor], err_msg=tensor)
    assert json.loads((source / "config.json").read_text()) == json.loads((back / "config.json").read_text())
    codebook = ["export", f"--checkpoint={there}", "--format=codebook-npz", f"--output={tmp_path / 'c.npz'}"]
    assert "exports as huggingface only" in _fails_last(codebook, capsys)
    for checkpoint in (source, there):
        decode = ["detokenize", f"--checkpoint={checkpoint}", "--input=x", "--output=y"]
        assert "holds a generator" in _fails_last(decode, capsys)


def test_benchmark_and_doctor(trained, tmp_path, capsys):
    output = tmp_path / "data.json"
    arguments = ["benchmark", "data", "--config", CONFIG, "--seconds=0.1", f"--output={output}"]
    assert cli.main(arguments) == 0
    assert "clips per second" in capsys.readouterr().out
    assert json.loads(output.read_text())["clip"] == [8, 32, 32, 3]
    assert "'0' is not a positive number of seconds" in fails([*arguments, "--seconds=0"], capsys)
    assert cli.main(["doctor"]) == 0
    assert "Devices" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_benchmark_of_the_tokenizer(what, tmp_path, capsys, small_ceilings):
    output = tmp_path / "codec.json"
    arguments = ["benchmark", what, "--config", CONFIG, "--batch-size=3", "--seconds=0.1", f"--output={output}"]
    assert cli.main(arguments) == 0
    assert "clips per second" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["batch_size"] == 8  # a multiple of the number of devices
    assert 1.0 < result["compiler_flops_share"] < 2.0
    assert 0.0 < result["mfu"] < 1.0
    assert result["clips_per_second"] == pytest.approx(8e3 / result["batch_ms"])
    assert result["memory_mb"] > 0 and result["ceiling_gigabytes_second"] > 0


@pytest.mark.slow
def test_benchmark_of_the_training_step(tmp_path, capsys, small_ceilings):
    """The step without a discriminator; test_bench_gpu.py has that with one."""
    output = tmp_path / "train.json"
    arguments = ["benchmark", "train", "--config", f"{CONFIG}:plain", "--seconds=0.1", f"--output={output}"]
    assert cli.main(arguments) == 0
    assert "clips per second" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert 1.0 < result["compiler_flops_share"] < 2.0
    assert 0.0 < result["mfu"] < 1.0
    assert result["clips_per_second"] == pytest.approx(8e3 / result["step_ms"])
    assert "gan_flops_ratio" not in result
