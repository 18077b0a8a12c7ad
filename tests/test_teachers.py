"""Teacher networks: features equal to those of the originals, sizes, and conversion of their weights."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from network_weights import write_teacher
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from larp_jax.cli import main
from larp_jax.config.teachers import REPOSITORIES, TEACHERS
from larp_jax.errors import InputError
from larp_jax.models.lpips import Lpips
from larp_jax.models.teachers import make_teacher
from larp_jax.tools import doctor
from larp_jax.weights import networks
from larp_jax.weights.teachers import import_teacher, known_name, read_config

final_features = jax.jit(lambda teacher, video: teacher(video))
features = jax.jit(lambda teacher, video, layers: (teacher(video), teacher.hidden(video, layers)), static_argnums=2)


def refusal(function, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_vgg16_is_part_of_lpips(tmp_path, monkeypatch, narrow_vgg):
    whole = Lpips(rngs=nnx.Rngs(3))
    params = {"/".join(path): np.asarray(x) for path, x in nnx.to_flat_state(nnx.state(whole))}
    path = tmp_path / "lpips.safetensors"
    networks.save(path, "lpips", params, [])
    monkeypatch.setenv("LARP_LPIPS", str(path))
    video = jax.random.uniform(jax.random.key(0), (2, 3, 16, 24, 3))
    assert networks.locate_teacher("vgg16") == ("vgg16", path, "LARP_LPIPS")
    teacher = networks.load_teacher("vgg16")
    final, (second, fourth) = features(teacher, video, (2, 4))
    assert teacher.grid((3, 16, 24)) == (3, 2, 3) and final.shape == (2, 3, 2, 3, teacher.dim)
    assert second.shape == (2, 3, 8, 12, 8) and final.dtype == jnp.float32
    np.testing.assert_array_equal(fourth, final)
    expected = jax.jit(lambda lpips, frames: lpips.features(frames))(whole, video.reshape(6, 16, 24, 3))
    for found, x in ((second, expected[1]), (final, expected[3])):
        found = found / (jnp.linalg.norm(found, axis=-1, keepdims=True) + 1e-10)
        np.testing.assert_allclose(found.reshape(x.shape), x, atol=1e-5)
    bigger = networks.load_teacher(os.fspath(path), resolution=32, dtype=jnp.bfloat16)
    resized = jax.eval_shape(bigger, video)
    assert resized.shape == (2, 3, 4, 4, 8) and resized.dtype == jnp.float32
    assert "no block 5" in refusal(teacher.hidden, video, (5,))
    assert "multiples of 8" in refusal(teacher, video[:, :, :15])
    assert "uint8 [2, 3, 16, 24, 3]" in refusal(teacher, (video * 255).astype(jnp.uint8))


# ------------------------------------------------------------------------------------------------ vision transformers

CASES = {"vjepa2": "vjepa2", "videomae": "videomae", "dinov2": "dinov2", "dinov2_reg": "dinov2", "dinov3": "dinov3"}


@pytest.mark.parametrize("case", CASES)
def test_features_equal_those_of_transformers(case, tmp_path, reference_dir, capsys):
    """Clips, images, and tables and rotations at another size, through the files of the hub."""
    output = tmp_path / f"{case}.safetensors"
    source = write_teacher(tmp_path, reference_dir, case)
    command = ["import", "--kind", CASES[case], "--source", str(source), "--output", str(output)]
    assert main(command) == 0
    assert f"{CASES[case]} imported into {output}" in capsys.readouterr().out
    teacher = networks.load_teacher(output, resolution=0)
    io = np.load(reference_dir / "teachers" / "io.npz")
    numbers = [number for number in range(2) if f"{case}/{number}/video" in io]
    assert numbers
    for number in numbers:
        video, final, block2 = (io[f"{case}/{number}/{name}"] for name in ("video", "final", "block2"))
        assert final.shape == (len(video), *teacher.grid(video.shape[1:4]), teacher.dim)
        if number == 0:
            found, (second,) = features(teacher, jnp.float32(video) / 255.0, (2,))
            np.testing.assert_allclose(second, block2, atol=1e-4)
        else:
            found = final_features(teacher, jnp.float32(video) / 255.0)
        np.testing.assert_allclose(found, final, atol=1e-4)
    assert set(networks.identify(CASES[case], output)["sources"]) == {"config.json", "model.safetensors"}


def test_resolution_dtype_and_gradient(tmp_path, reference_dir):
    """Frames are resized; bfloat16 changes little; gradients reach the clip, which is longer than those of training."""
    config, params, sources = import_teacher("videomae", write_teacher(tmp_path, reference_dir, "videomae"))
    assert config.resolution == 12 and config.table == (2, 3, 3)
    path = tmp_path / "videomae.safetensors"
    networks.save(path, "videomae", params, sources, config)
    plain, other = networks.load_teacher(path), networks.load_teacher(path, remat="block", dtype=jnp.bfloat16)
    clip = jax.random.uniform(jax.random.key(1), (1, 6, 6, 6, 3))
    (value, slope), (near, _) = (loss_and_gradient(teacher, clip) for teacher in (plain, other))
    np.testing.assert_allclose(near, value, rtol=0.05)
    assert slope.shape == clip.shape and float(jnp.abs(slope).min()) > 0.0

    def doubled(row):
        return np.interp((np.arange(12) + 0.5) / 2.0 - 0.5, np.arange(6), row)

    large = np.apply_along_axis(doubled, 3, np.apply_along_axis(doubled, 2, clip))
    native = networks.load_teacher(path, resolution=0)
    found = final_features(native, jnp.float32(large))
    np.testing.assert_allclose(jnp.square(found[..., 0] - 1.0).mean(), value, rtol=1e-4)


@jax.jit
def loss_and_gradient(teacher, video):
    return jax.value_and_grad(lambda video: jnp.square(teacher(video)[..., 0] - 1.0).mean())(video)


# Millions of parameters as the authors state them: README of V-JEPA 2 (github.com/facebookresearch/vjepa2), table 8 of
# VideoMAE (arXiv 2203.12602), README of DINOv2 (github.com/facebookresearch/dinov2) and table of DINOv3's README.
PUBLISHED = {"vjepa2_l": 300, "vjepa2_h": 600, "vjepa2_g": 1000, "videomae_b": 87, "videomae_l": 305}
PUBLISHED |= {f"dinov2_{size}": n for size, n in zip("sbl", (21, 86, 300), strict=True)}
PUBLISHED |= {f"dinov2_{size}_reg": n for size, n in zip("sbl", (21, 86, 300), strict=True)}
PUBLISHED |= {f"dinov3_{size}": n for size, n in zip("sbl", (21, 86, 300), strict=True)}


def test_full_sizes(reference_dir):
    """Settings and counts are those of transformers, and near those of the authors; shapes for clips of 128 pixels."""
    originals = json.loads((reference_dir / "teachers" / "setup.json").read_text())["full"]
    assert originals.keys() == PUBLISHED.keys() == REPOSITORIES.keys() == TEACHERS.keys() - {"vgg16"}
    for name, config in TEACHERS.items():
        if name == "vgg16":
            continue
        teacher = nnx.eval_shape(lambda config=config: make_teacher(config, rngs=nnx.Rngs(0)))
        count = sum(math.prod(shape) for shape in networks.shapes_by_path(nnx.state(teacher)).values())
        # zeros for the biases of keys that they lack; their mask token is not read; the class token has its position
        extra = {"videomae": config.depth, "dinov2": -2, "dinov3": config.depth - 1}.get(config.family, 0)
        assert count == originals[name]["parameters"] + extra * config.width, name
        assert known_name(read_config(config.family, originals[name]["config"], "config.json")) == name
        assert abs(count / 1e6 / PUBLISHED[name] - 1) < 0.06, name
        found = jax.eval_shape(final_features, teacher, jax.ShapeDtypeStruct((2, 16, 128, 128, 3), jnp.float32))
        side = 14 if config.family == "videomae" else 16
        assert found.shape == (2, 16 // config.traits.tubelet, side, side, config.width), name


def edited(folder, **changes):
    """The folder, after changes of its config.json; None removes a setting."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
    return folder


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("vjepa2", {"model_type": "videomae"}, "model_type='videomae' is not vjepa2; check --kind"),
        ("vjepa2", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported, only 'gelu'"),
        ("vjepa2", {"num_hidden_layers": 10**5}, "52 tensors for 100000 layers"),
        ("vjepa2", {"num_hidden_layers": 4}, "missing encoder.layer.3.attention.key.bias"),
        ("vjepa2", {"hidden_size": "32"}, "hidden_size='32' must be a positive whole number"),
        ("vjepa2", {"num_attention_heads": 5}, "must be an even multiple of teacher.heads=5"),
        ("vjepa2", {"crop_size": 13}, "teacher.resolution=13 must be a multiple of its patch of 4 pixels"),
        ("vjepa2", {"mlp_ratio": "4"}, "mlp_ratio='4' must be a positive number"),
        ("videomae", {"use_mean_pooling": True}, "not expected layernorm.bias, layernorm.weight"),
        ("dinov2", {"image_size": 24}, "embeddings.position_embeddings [1, 26, 24] for [1, 37, 24]"),
        ("dinov2", {"image_size": 2**19}, "places, above the limit of 1048576"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn=True is not supported"),
        ("dinov2_reg", {"num_register_tokens": None}, "num_register_tokens=None must be a positive whole number"),
        ("dinov3", {"intermediate_size": 81}, "of the wrong shape layer.0.mlp.down_proj.weight [24, 80] for [24, 81]"),
    ],
)
def test_other_networks_are_refused(case, changes, message, tmp_path, reference_dir):
    folder = edited(write_teacher(tmp_path, reference_dir, case), **changes)
    assert message in refusal(import_teacher, CASES[case], folder)


def test_files_are_checked(tmp_path, reference_dir, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_teacher(tmp_path, reference_dir, "dinov3")
    command = ["import", "--kind", "dinov3", "--source", str(folder)]
    assert main(command) == 2 and "these sizes have no name; give --output FILE" in capsys.readouterr().err
    # with a name, the file is where doctor and load_teacher look
    config, *_ = import_teacher("dinov3", folder)
    monkeypatch.setitem(TEACHERS, "dinov3_s", config)
    place = tmp_path / ".cache" / "larp_jax" / "dinov3_s.safetensors"
    hint = "larp-jax import --kind dinov3 --source facebook/dinov3-vits16-pretrain-lvd1689m"
    assert f"no weights of dinov3_s at {place} (LARP_DINOV3_S is not set); {hint}" in refusal(
        networks.load_teacher, "dinov3_s"
    )
    assert "dinov3_s, " in doctor.report() and f"found at {place}" not in doctor.report()
    assert main(command) == 0 and f"dinov3_s imported into {place}" in capsys.readouterr().out
    assert f"dinov3_s             found at {place}" in doctor.report()
    assert networks.load_teacher("dinov3_s").config == config
    assert networks.teacher_config(place, resolution=8).resolution == 8
    # other networks under this name or path
    monkeypatch.setenv("LARP_DINOV3_B", str(place))
    assert "contains a dinov3 of other sizes than dinov3_b" in refusal(networks.load_teacher, "dinov3_b")
    assert "dinov3_x is neither a teacher (vgg16, " in refusal(networks.load_teacher, "dinov3_x")
    tensors = load_file(place)
    for metadata, message in [
        (None, "contains no weights, which is no teacher"),
        ({"larp_jax": "i3d"}, "contains weights of i3d, which is no teacher"),
        ({"larp_jax": "dinov3"}, "does not describe its network"),
        ({"larp_jax": "dinov3", "config": '{"table": 1}'}, "does not describe its network"),
        ({"larp_jax": "vjepa2", "config": metadata_of(place)["config"]}, "describes a dinov3, but contains weights of"),
    ]:
        save_file(tensors, tmp_path / "other.safetensors", metadata)
        assert message in refusal(networks.load_teacher, tmp_path / "other.safetensors")
    save_file({"norm/bias": tensors["norm/bias"]}, tmp_path / "other.safetensors", metadata_of(place))
    assert "missing blocks/mlp/down/bias" in refusal(networks.load_teacher, tmp_path / "other.safetensors")
    # files of the hub
    (folder / "config.json").rename(tmp_path / "config.json")
    assert "config.json is missing" in refusal(import_teacher, "dinov3", folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "is not a safetensors file" in refusal(import_teacher, "dinov3", folder)
    assert "is not a safetensors file" in refusal(import_teacher, "dinov3", folder / "pytorch_model.bin")


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata()
