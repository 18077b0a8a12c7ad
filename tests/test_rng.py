"""Keys from seeds and from users, and random numbers that do not depend on the settings of JAX."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larp_jax import data
from larp_jax.api import LoadedTokenizer
from larp_jax.errors import InputError
from larp_jax.models.categorical import sample
from larp_jax.runtime import rng

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), dtype=np.uint8)


@contextlib.contextmanager
def unusual_settings():
    """Sets options of JAX that users may also set with environment variables of these names."""
    with jax.enable_x64(True), jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        yield


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1])
def test_seeds_of_32_bits_keep_their_keys(seed):
    assert bits(rng.key(seed)) == bits(jax.random.key(seed))


def test_all_bits_of_a_seed_count():
    keys = [bits(rng.key(seed)) for seed in (5, 2**32 + 5, 2**63, 2**63 + 5, 2**64 - 1)]
    assert keys == [[0, 5], [1, 5], [2**31, 0], [2**31, 5], [2**32 - 1, 2**32 - 1]]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0"])
def test_invalid_seeds(seed):
    with pytest.raises(InputError, match=r"seed must be an integer from 0 to 2\^64 - 1"):
        rng.key(seed)


def test_data_takes_seeds_of_64_bits(trained):
    first = []
    for seed in (5, 2**32 + 5, 2**63, 2**64 - 1):
        clip = data.ClipSpec(frames=8, resolution=32, flip=True)
        with data.train_batches("moving_shapes", clip, batch_size=8, seed=seed) as batches:
            first.append(next(batches)["video"].tobytes())
    assert len(set(first)) == 4


def test_keys_of_users():
    key = jax.random.key(3)
    assert rng.as_key(key) is key
    assert bits(rng.as_key(jax.random.PRNGKey(3))) == bits(key)
    others = [jax.random.key(seed, impl=impl) for impl in ("rbg", "unsafe_rbg") for seed in (0, 1)]
    others += [jax.random.PRNGKey(seed, impl="rbg") for seed in (0, 1)]
    found = [rng.as_key(other) for other in others]
    assert {str(jax.random.key_impl(key)) for key in found} == {"threefry2x32"}
    assert bits(found[0]) != bits(found[1])
    assert bits(found[0]) == bits(found[4]) and bits(found[1]) == bits(found[5])
    for wrong in (5, None, np.zeros(2), np.zeros(3, np.uint32), jax.random.split(key)):
        with pytest.raises(ValueError, match="key must be one random key"):
            rng.as_key(wrong)


def test_settings_of_jax_do_not_change_random_numbers():
    def numbers():
        key = rng.key(1)
        logits = jnp.linspace(0.0, 3.0, 200)
        return (
            jax.random.normal(key, (5,)),
            jax.random.choice(key, 10, (4,)),
            jax.random.uniform(jax.random.key(2), (5,)),
            jax.jit(sample)(key, logits),
        )

    expected = numbers()
    with unusual_settings(), rng.pinned():
        found = numbers()
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_settings_of_jax_do_not_change_codes_and_videos(tokenizer):
    quantizer = dataclasses.replace(tokenizer.config.quantizer, temperature=1.0)
    warm = dataclasses.replace(tokenizer.config, quantizer=quantizer)
    params, key = jax.device_get(tokenizer.params), jax.random.key(4)
    tokenizer = LoadedTokenizer(warm, params)
    codes, drawn = tokenizer.encode(VIDEO), tokenizer.encode(VIDEO, key)
    assert np.any(codes != drawn)
    with unusual_settings():
        loaded = LoadedTokenizer(warm, params)
        np.testing.assert_array_equal(loaded.encode(jnp.asarray(VIDEO / 255.0)), tokenizer.encode(VIDEO / 255.0))
        np.testing.assert_array_equal(loaded.encode(VIDEO, key), drawn)
        video = loaded.decode(jnp.asarray(codes).astype(jnp.int64))
        assert loaded.encode(VIDEO, jax.random.key(4)).shape == codes.shape  # a key of another implementation
    assert video.dtype == jnp.float32
    np.testing.assert_array_equal(video, tokenizer.decode(codes))
