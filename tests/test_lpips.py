"""LPIPS agrees with the reference; its weights file is found and checked as documented."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fidelity import lpips_deviations
from network_weights import vgg_tensors, write_lpips
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from larp_jax.cli import main
from larp_jax.errors import InputError
from larp_jax.tools import doctor
from larp_jax.weights import networks
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
    assert "--heads" in capsys.readouterr().err
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
    for kind, original in [("lpips", "vgg16-397923af.pth"), ("i3d", "rgb_imagenet.pt")]:
        (line,) = [line for line in report.splitlines() if str(default / f"{kind}.safetensors") in line]
        assert "missing" in line and f"LARP_{kind.upper()}" in line and original in line
    monkeypatch.setenv("LARP_LPIPS", str(weights))
    assert networks.locate("lpips") == (weights, "LARP_LPIPS")
    assert networks.locate("lpips", tmp_path)[0] == tmp_path
    assert f"found at {weights}" in doctor.report()
    networks.load_lpips()
