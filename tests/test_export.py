"""Exported models can be imported unchanged, and failed exports leave no incomplete files."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from fidelity import build
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from test_importing import EVERYTHING, FOLDED, FOLDERS, MODEL, NOTHING, OPTIONS, WIDTH

from larp_jax import config as cfg
from larp_jax.config import GeneratorConfig, PriorConfig, TokenizerConfig, TokenizerRecipe
from larp_jax.errors import InputError
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.weights import export, released
from larp_jax.weights.fingerprint import fingerprint
from larp_jax.weights.importing import import_huggingface

ROOT = pathlib.Path(__file__).parents[1]


def random_params(config) -> dict:
    items, rng = released.model_tensors(config), np.random.default_rng(0)
    shapes = released.expected_shapes(items)
    tensors = {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return released.params_from_released(items, tensors)


def assert_same(params, other):
    leaves, structure = jax.tree.flatten(params)
    assert structure == jax.tree.structure(other)
    for x, y in zip(leaves, jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", [*FOLDERS, *OPTIONS])
def test_import_then_export_gives_the_same_files(reference_dir, tmp_path, name):
    kind, config, params = import_huggingface(reference_dir / name)
    export.export_huggingface(tmp_path / "out", config, params)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (reference_dir / name / path.name).read_bytes(), path.name
    again = import_huggingface(tmp_path / "out")
    assert again[:2] == (kind, config)
    assert_same(params, again[2])


@pytest.mark.parametrize("name", FOLDED)
def test_folded_constants_are_exported_as_an_equal_model(reference_dir, tmp_path, name):
    _, config, params = import_huggingface(reference_dir / name)
    export.export_huggingface(tmp_path / "out", config, params)
    _, again, params_again = import_huggingface(tmp_path / "out")
    assert again == config
    assert_same(params, params_again)


def recipe(model=None, prior=None, **options) -> TokenizerRecipe:
    model = TokenizerConfig(size="custom", **MODEL | (model or {}))
    return TokenizerRecipe(model=model, prior=PriorConfig(**{"size": "custom"} | WIDTH | (prior or {})), **options)


def quantizer(**options) -> cfg.QuantizerConfig:
    return dataclasses.replace(MODEL["quantizer"], **options)


CONFIGS = {
    "plain": recipe(),
    "learned": recipe(EVERYTHING),
    "fixed": recipe(NOTHING | dict(latent_position_base=5000.0, encoder_query_gaussian_init=False)),
    "frames": recipe(dict(patch_frames=1, decoder_patch_frames=1)),
    "vq": recipe(dict(quantizer=cfg.QuantizerConfig(kind="vq", codebook_size=20, code_dim=4, entropy_weight=0.1))),
    "vq of any length": recipe(dict(quantizer=quantizer(kind="vq", l2_normalized=False))),
    "norm of tokens": recipe(dict(quantizer=quantizer(norm="ln_nd"))),
    "kl": TokenizerRecipe(
        model=TokenizerConfig(size="custom", **MODEL | dict(quantizer=quantizer(kind="kl", norm="ln_d"))),
        loss=cfg.LossConfig(prior_weight=0.0),
    ),
    "named prior": recipe(prior=dict(size="XXS", width=256, depth=6, heads=4, dropout=0.0, mix_max=1.0, mix_ramp=0.0)),
    "long prior": recipe(prior=dict(size="XXS", width=256, depth=6, heads=4, positions=1024, dropout=0.2)),
    "class": GeneratorConfig(size="custom", **WIDTH | dict(codebook_size=10, num_tokens=5, fixed_positions=True)),
    "frame prediction": GeneratorConfig(
        size="custom", **WIDTH | dict(codebook_size=10, num_tokens=5, frame_prediction=True, kv_heads=1)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_gives_the_same_model(tmp_path, name):
    config = CONFIGS[name]
    params = random_params(config)
    export.export_huggingface(tmp_path / "out", config, params)
    _, imported, again = import_huggingface(tmp_path / "out")
    assert imported == config
    assert_same(params, again)


def test_export_without_the_prior(reference_dir, tmp_path):
    _, config, params = import_huggingface(reference_dir / "tokenizer")
    export.export_huggingface(tmp_path / "out", config, {"tokenizer": params["tokenizer"]})
    _, imported, again = import_huggingface(tmp_path / "out")
    assert imported.loss.prior_weight == 0 and set(again) == {"tokenizer"}
    assert not any(name.startswith("prior_model") for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_round_trip_without_torch(reference_dir, tmp_path):
    code = f"""
import sys
class Blocker:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("torch is blocked", name=name)
sys.meta_path.insert(0, Blocker)
from larp_jax.weights.export import export_huggingface
from larp_jax.weights.importing import import_huggingface
_, config, params = import_huggingface({str(reference_dir / "tokenizer")!r})
export_huggingface({str(tmp_path / "out")!r}, config, params)
assert import_huggingface({str(tmp_path / "out")!r})[1] == config
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(quantizer=cfg.QuantizerConfig(input_norm="layer")), "quantizer.input_norm='layer'"),
        (dict(decoder_patch_frames=4), "decoder_patch_frames=4"),
    ],
)
def test_settings_that_the_released_layout_does_not_support(tmp_path, changes, word):
    config = recipe(changes, loss=cfg.LossConfig(prior_weight=0.0))
    with pytest.raises(InputError, match=word):
        export.export_huggingface(tmp_path / "out", config, {"tokenizer": {}})
    assert not list(tmp_path.iterdir())


def test_training_settings_do_not_prevent_export(reference_dir, tmp_path):
    _, config, params = import_huggingface(reference_dir / "tokenizer")
    quantizer = dataclasses.replace(config.model.quantizer, temperature_start=1.0, temperature_ramp=0.1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantizer=quantizer))
    export.export_huggingface(tmp_path / "out", config, params)


def test_nothing_is_overwritten(tmp_path, reference_dir):
    _, config, params = import_huggingface(reference_dir / "ar_class")
    (tmp_path / "out").mkdir()
    export.export_huggingface(tmp_path / "out", config, params)
    with pytest.raises(InputError, match="already exists"):
        export.export_huggingface(tmp_path / "out", config, params)


def test_a_full_disk_leaves_nothing(tmp_path, reference_dir, monkeypatch):
    _, config, params = import_huggingface(reference_dir / "ar_class")

    def half(tensors, path):
        pathlib.Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(export, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        export.export_huggingface(tmp_path / "out", config, params)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_codebook(tmp_path, reference_dir, monkeypatch):
    _, config, params = import_huggingface(reference_dir / "tokenizer")

    def full(path, content):  # fails for the manifest, after the codebook is written
        raise OSError("No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError):
        export.export_codebook_npz(tmp_path / "codebook.npz", config.model, params["tokenizer"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tokenizer(reference_dir):
    """Configuration and parameters of the reference's tokenizer."""
    _, config, params = import_huggingface(reference_dir / "tokenizer")
    return config.model, params["tokenizer"]


def example(content: str) -> str:
    """The Python example of the documentation that contains a text."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    (one,) = [text for text in found if content in text]
    return one


def test_codebooks(tokenizer, tmp_path, monkeypatch):
    config, params = tokenizer
    counts = np.arange(64)
    export.export_codebook_npz(tmp_path / "codebook.npz", config, params, step=7, usage_counts=counts)
    manifest = json.loads((tmp_path / "codebook.json").read_text())
    expected = {"K": 64, "d": 8, "normalisation": "l2", "temperature": 0.03, "N": 12, "clip": [8, 32, 32, 3]}
    expected |= {"patch": [4, 8, 8], "step": 7, "fingerprint": fingerprint(config, params)}
    assert manifest == expected | {"usage_counts": counts.tolist()}
    export.export_codebook_safetensors(tmp_path / "codebook.safetensors", config, params)
    with np.load(tmp_path / "codebook.npz") as file, safe_open(tmp_path / "codebook.safetensors", "np") as other:
        codebook = file["codebook"]
        assert json.loads(file["manifest"].tobytes()) == manifest
        np.testing.assert_array_equal(other.get_tensor("codebook"), codebook)
    assert codebook.shape == (64, 8) and codebook.dtype == np.float32
    embedding = params["quantizer"]["embedding"]
    plain = dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, kind="vq", l2_normalized=False))
    export.export_codebook_npz(tmp_path / "plain.npz", plain, params)
    assert json.loads((tmp_path / "plain.json").read_text())["normalisation"] == "none"
    np.testing.assert_array_equal(np.load(tmp_path / "plain.npz")["codebook"], embedding)
    np.testing.assert_allclose(codebook, embedding / np.linalg.norm(embedding, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ValueError, match="usage counts"):
        export.export_codebook_npz(tmp_path / "codebook.npz", config, params, usage_counts=[1, 2])

    monkeypatch.chdir(tmp_path)
    found = {}
    exec(example("codebook.npz"), found)
    np.testing.assert_array_equal(found["codebook"], codebook)
    assert found["manifest"] == json.loads((tmp_path / "codebook.json").read_text())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_codebooks_replace_codebooks_only(tokenizer, tmp_path, suffix):
    write = {".npz": export.export_codebook_npz, ".safetensors": export.export_codebook_safetensors}[suffix]
    (tmp_path / "config.json").write_text('{"stage": "tokenizer"}')
    (tmp_path / "manifest.json").write_text(json.dumps(export.codebook_manifest(*tokenizer) | {"jax": "0"}))
    (tmp_path / f"model{suffix}").write_bytes(b"weights of something")
    os.mkfifo(tmp_path / f"pipe{suffix}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name, message in (
        (f"config{suffix}", r"manifest of --output .*config.json exists"),
        (f"manifest{suffix}", r"manifest of --output .*manifest.json exists"),
        (f"model{suffix}", "was not written by this command"),
        (f"pipe{suffix}", "not a regular file"),
        ("codebook.json", f"must end in {suffix}"),
        ("codebook", f"must end in {suffix}"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path / name, *tokenizer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    for step in (1, 2):  # the second replaces the first
        write(tmp_path / f"codebook{suffix}", *tokenizer, step=step)
        assert json.loads((tmp_path / "codebook.json").read_text())["step"] == step


def test_functions_for_other_programs(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers")
    config, params = tokenizer
    export.export_stablehlo(tmp_path / "exported", config, params, step=3)
    manifest = json.loads((tmp_path / "exported" / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["jax"] == jax.__version__
    assert manifest["readable_by"] == f"JAX from 3 weeks before to 6 months after {jax.__version__}"
    for name in ("encode.bin", "decode.bin"):
        content = (tmp_path / "exported" / name).read_bytes()
        for part in (str(ROOT), str(pathlib.Path(jax.__file__).parents[1]), ".py", str(tmp_path)):
            assert part.encode() not in content, (name, part)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(example("encode.bin"), found)  # the example of the documentation
    model = build(lambda: Tokenizer(config, rngs=nnx.Rngs(0)), params)
    expected, quantized = model(found["video"])
    np.testing.assert_array_equal(found["codes"], quantized.indices)
    np.testing.assert_allclose(found["reconstruction"], np.clip(expected, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(found["encode"].call(found["video"][:1]), quantized.indices[:1])
    assert found["encode"].platforms == ("cpu", "cuda", "tpu")
    assert found["encode"].calling_convention_version == manifest["calling_convention"]


def test_functions_of_many_tokens(tmp_path):
    """With more than 64 tokens, the nearest codes are found in chunks."""
    pytest.importorskip("flatbuffers")
    config = recipe(dict(num_tokens=70), loss=cfg.LossConfig(prior_weight=0.0))
    params = random_params(config)["tokenizer"]
    export.export_stablehlo(tmp_path / "out", config.model, params)
    encode = jax.export.deserialize(bytearray((tmp_path / "out" / "encode.bin").read_bytes()))
    video = np.random.default_rng(0).random((3, *config.model.clip_shape), np.float32)
    model = build(lambda: Tokenizer(config.model, rngs=nnx.Rngs(0)), params)
    np.testing.assert_array_equal(encode.call(video), model.quantize(video).indices)


@pytest.mark.parametrize("name", ["codebook_npz", "codebook_safetensors"])
def test_continuous_latents_have_no_codebook(tmp_path, name):
    config = TokenizerConfig(quantizer=cfg.QuantizerConfig(kind="kl"))
    with pytest.raises(InputError, match="continuous"):
        getattr(export, f"export_{name}")(tmp_path / "out", config, {})


def test_the_fingerprint_depends_on_what_determines_codes(tokenizer):
    config, params = tokenizer
    original = fingerprint(config, params)
    assert re.fullmatch("[0-9a-f]{16}", original)
    assert original == fingerprint(config, jax.tree.map(jax.numpy.asarray, params))

    def changed(*path):
        copy = jax.tree.map(np.copy, params)
        node = copy
        for part in path:
            node = node[part]
        node.flat[0] += 1e-3
        return fingerprint(config, copy)

    assert changed("quantizer", "embedding") != original
    assert changed("encoder", "queries", "table") != original
    assert changed("decoder", "head", "kernel") == original
    assert changed("quantizer", "out_linear", "kernel") == original

    def configured(**options):
        return fingerprint(dataclasses.replace(config, **options), params)

    assert configured(size="larp_s", query_init_std=1.0, learned_decoder_latent_pe=True) == original
    assert configured(frames=16) != original
    assert configured(encoder=cfg.TransformerConfig(width=48, depth=2, heads=2)) != original


def test_the_fingerprint_is_stable_across_versions(tokenizer):
    """Codes on disk contain it, so it must not change with the version of the package."""
    assert fingerprint(*tokenizer) == "4bfb38d21eb80d60"
