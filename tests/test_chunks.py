"""Chunked logits: values and gradients are those of complete logits, which are never in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from larp_jax.models.next_code import next_code, score_tokens
from larp_jax.models.quantizer import nearest_codes, normalize

B, N, D, K = 2, 150, 16, 300  # three chunks of tokens, the last of them shorter


@pytest.fixture(scope="module")
def arrays():
    """Features, unit vectors, target codes, a codebook, a head."""
    keys = jax.random.split(jax.random.key(0), 4)
    features, codebook = jax.random.normal(keys[0], (B, N, D)), normalize(jax.random.normal(keys[1], (K, D)))
    targets = jax.random.randint(keys[2], (B, N), 0, K)
    return features, normalize(features), targets, codebook, jax.random.normal(keys[3], (D, K))


def cross_entropy(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0].mean()


def assert_same_value_and_gradient(ours, whole, *arguments):
    found, expected = (jax.value_and_grad(f, tuple(range(len(arguments))))(*arguments) for f in (ours, whole))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        assert np.abs(b).max() > 1e-5
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_the_priors_cross_entropy(arrays):
    _, predicted, targets, codebook, _ = arrays
    assert_same_value_and_gradient(
        lambda x: next_code(x, targets, codebook, temperature=0.2).cross_entropy.mean(),
        lambda x: cross_entropy(x @ codebook.T / 0.2, targets),
        predicted,
    )


def test_the_generators_cross_entropy(arrays):
    features, _, targets, _, head = arrays
    assert_same_value_and_gradient(
        lambda x, head: score_tokens(lambda x: x @ head, x, targets).cross_entropy.mean(),
        lambda x, head: cross_entropy(x @ head, targets),
        features,
        head,
    )


def test_the_nearest_codes(arrays):
    _, z, _, codebook, _ = arrays
    np.testing.assert_array_equal(nearest_codes(z, codebook), jnp.argmax(z @ codebook.T, axis=-1))


def test_complete_logits_are_never_in_memory():
    def step(z, codebook):
        drawn = nearest_codes(z, codebook, key=jax.random.key(0), temperature=0.03)
        return next_code(z, drawn, codebook, key=jax.random.key(1)).cross_entropy.mean()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 1024, 16), (8192, 16))]
    held = jax.jit(jax.grad(step)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * 1024 * 8192 * 4 / 3
