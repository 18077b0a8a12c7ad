"""Teacher networks: features equal to those of the originals, sizes, and conversion of their weights."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from larp_jax.errors import InputError
from larp_jax.models.lpips import Lpips
from larp_jax.weights import networks

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
    expected = whole.features(video.reshape(6, 16, 24, 3))
    for found, x in ((second, expected[1]), (final, expected[3])):
        found = found / (jnp.linalg.norm(found, axis=-1, keepdims=True) + 1e-10)
        np.testing.assert_allclose(found.reshape(x.shape), x, atol=1e-5)
    bigger = networks.load_teacher(os.fspath(path), resolution=32, dtype=jnp.bfloat16)
    assert bigger(video).shape == (2, 3, 4, 4, 8) and bigger(video).dtype == jnp.float32
    assert "no block 5" in refusal(teacher.hidden, video, (5,))
    assert "multiples of 8" in refusal(teacher, video[:, :, :15])
    assert "uint8 [2, 3, 16, 24, 3]" in refusal(teacher, (video * 255).astype(jnp.uint8))
