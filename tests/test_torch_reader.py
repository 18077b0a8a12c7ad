"""The reader for PyTorch: equal codes and reconstructions, and refusals in one line."""

import json
import shutil

import numpy as np
import pytest
from data_helpers import moving_frames
from test_layers import import_without

from larp_jax import cli
from larp_jax.weights import released_config

torch = pytest.importorskip("torch")

from larp_jax import torch_reader  # noqa: E402

OPTIONS = "tokenizer base_100 bn_bn frame_patches learned_temperature ln_d ln_nd rounds vq_l2"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "tokenizer"
    assert cli.main(["export", f"--checkpoint={trained}", "--format=huggingface", f"--output={folder}"]) == 0
    return folder


def test_codes_and_reconstructions_are_those_of_jax(exported, tokenizer):
    reader = torch_reader.load_tokenizer(exported)
    video = np.stack([moving_frames(8, 32, 32, seed=seed) for seed in range(4)])
    codes = np.array(tokenizer.encode(video))
    found = reader.encode(torch.from_numpy(video))
    assert found.dtype == torch.int64 and reader.num_tokens == codes.shape[1] and len(np.unique(codes)) > 1
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(reader.encode(torch.from_numpy(video / np.float64(255))), codes)
    np.testing.assert_allclose(reader.decode(found), tokenizer.decode(codes), atol=1e-4)
    np.testing.assert_allclose(reader.codebook, tokenizer.codebook, atol=1e-6)
    assert reader.clip_shape == tokenizer.config.clip_shape


@pytest.mark.parametrize("name", OPTIONS.split())
def test_options_of_the_authors_code(name, reference_dir):
    folder = reference_dir / (name if name == "tokenizer" else f"tokenizer_{name}")
    reader = torch_reader.load_tokenizer(folder)
    with np.load(folder / "io.npz") as expected:
        video = torch.from_numpy(expected["video"]).permute(0, 2, 3, 4, 1)
        np.testing.assert_array_equal(reader.encode(video), expected["indices"])
        if "reconstruction_from_indices" in expected:
            decoded = reader.decode(torch.from_numpy(expected["indices"])).permute(0, 4, 1, 2, 3)
            np.testing.assert_allclose(decoded, expected["reconstruction_from_indices"].clip(0, 1), atol=1e-4)


def test_it_needs_neither_jax_nor_the_rest_of_the_package():
    blocked = ["jax", "jaxlib", "flax", "ml_collections", "einops", "orbax", "ml_dtypes"]
    result = import_without(blocked, ["larp_jax.torch_reader"])
    assert result.returncode == 0, result.stderr


def test_every_exported_field_is_known():
    exported = {field.released for field in (*released_config.TOKENIZER_FIELDS, *released_config.VQ_FIELDS)}
    known = torch_reader.SIZES.keys() | torch_reader.SWITCHES.keys() | torch_reader.FIXED.keys() | torch_reader.UNUSED
    assert exported <= known | {"decoder_patch_size", "decoder_temporal_patch_size"}
    defaults = {field.released: field.default for field in released_config.TOKENIZER_FIELDS}
    for name, default in (torch_reader.SIZES | torch_reader.SWITCHES).items():
        if default is not None and name in defaults:
            assert defaults[name] == default, name


def test_what_it_does_not_know_is_refused_in_one_line(exported, reference_dir, tmp_path):
    def refused(message, change=None, folder=None):
        if folder is None:
            folder = tmp_path / "changed"
            shutil.copytree(exported, folder, dirs_exist_ok=True)
            values = json.loads((exported / "config.json").read_text())
            change(values)
            (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message) as raised:
            torch_reader.load_tokenizer(folder)
        assert "\n" not in str(raised.value)

    refused("regularizer.name='skl' has no codes", folder=reference_dir / "tokenizer_kl")
    refused("has no bottleneck", folder=reference_dir / "ar_class")
    refused("No such file", folder=tmp_path)
    refused("rotary=True is not known", lambda values: values.update(rotary=True))
    refused("encoder_name='other' is not known", lambda values: values.update(encoder_name="other"))
    refused("decoder_patch_size=4 must equal", lambda values: values.update(decoder_patch_size=4))
    refused("frame_num must be a positive integer, got '8'", lambda values: values.update(frame_num="8"))
    refused("frame_num=6 must be a multiple", lambda values: values.update(frame_num=6))
    refused("too few layers", lambda values: values.update(encoder_depth=10**9))
    refused(r"decoder_latent_pe is \(1, 8, 32\), and config.json asks for \(1, 5, 32\)",
            lambda values: values.update(bottleneck_token_num=5))  # fmt: skip
    (tmp_path / "changed" / "config.json").write_text((exported / "config.json").read_text())
    (tmp_path / "changed" / "model.safetensors").write_bytes(b"damaged")
    refused("model.safetensors cannot be read", folder=tmp_path / "changed")


def test_inputs_of_another_shape_are_refused(exported):
    reader = torch_reader.load_tokenizer(exported)
    for call in (
        lambda: reader.encode(torch.zeros(1, 8, 32, 32)),
        lambda: reader.encode(torch.zeros(1, *reader.clip_shape, dtype=torch.int32)),
        lambda: reader.decode(torch.zeros(1, 3, dtype=torch.int64)),
        lambda: reader.decode(torch.zeros(1, reader.num_tokens)),
        lambda: reader.decode(torch.full((1, reader.num_tokens), 10**6)),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
