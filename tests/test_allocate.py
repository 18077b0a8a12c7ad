"""The quality of every assignment, rewards, and the fewest codes that reach a quality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_adaptive import CONFIG, noisy

from larp_jax import metrics
from larp_jax.allocation import QualityTree, greedy_lengths
from larp_jax.config import Greedy
from larp_jax.models.tokenizer import Tokenizer

LADDER = CONFIG.adaptive


@pytest.fixture(scope="module")
def model():
    """`module(params)`, the parameters, and clips."""
    graphdef, params = nnx.split(noisy(Tokenizer(CONFIG, rngs=nnx.Rngs(0))))
    video = jax.random.uniform(jax.random.key(3), (3, *CONFIG.clip_shape))
    return lambda params: nnx.merge(graphdef, params), params, video


def reconstructed(model, lengths):
    """Reconstructions of all clips with these lengths, by the whole tokenizer."""
    module, params, video = model
    return jnp.clip(module(params)(video, jnp.asarray(lengths))[0], 0.0, 1.0)


def test_the_tree_of_prefixes_gives_the_quality_of_full_decodes(model):
    module, params, video = model
    found = QualityTree(CONFIG, module).measure(params, video)
    assert found.keys() == {"psnr"} and found["psnr"].shape == (3, LADDER.count)
    assert found["psnr"].std() > 0.01
    for number, lengths in enumerate(LADDER.assignments):
        full = reconstructed(model, np.tile(lengths, (3, 1)))
        mse = jnp.square(full - video).mean((1, 2, 3, 4))
        np.testing.assert_allclose(10 ** (-found["psnr"][:, number] / 10), mse, rtol=1e-5, err_msg=str(lengths))
        np.testing.assert_allclose(found["psnr"][:, number], metrics.psnr(video, full), atol=1e-4)


def test_greedy_gives_each_block_the_fewest_codes_that_reach_the_target(model):
    module, params, video = model
    blocks = np.stack(np.split(np.asarray(video), CONFIG.blocks, axis=1))

    def of_blocks(lengths):
        full = np.stack(np.split(np.asarray(reconstructed(model, lengths)), CONFIG.blocks, axis=1))
        return -10 * np.log10(np.square(full - blocks).mean((2, 3, 4, 5))).T

    every = np.stack([of_blocks(np.tile(x, (3, 1))) for x in LADDER.assignments])
    choose = jax.jit(lambda target: greedy_lengths(module(params), video, Greedy("psnr", target)))
    levels = np.sort(every, axis=None)
    found = set()
    for place in np.flatnonzero(np.diff(levels) > 1e-3)[::4]:
        target = float(levels[place : place + 2].mean())
        for clip, row in enumerate(np.asarray(choose(target))):
            assert tuple(row) in LADDER.assignments
            found.add(tuple(row))
            for block in range(CONFIG.blocks):  # no smaller number would do
                for other in LADDER.assignments:
                    if other[:block] == tuple(row[:block]) and other[block] < row[block]:
                        assert every[LADDER.assignments.index(other), clip, block] < target
    assert len(found) > 2
    np.testing.assert_array_equal(choose(-50.0), np.full((3, 2), 2))
    np.testing.assert_array_equal(choose(99.0), np.tile([8, 4], (3, 1)))
