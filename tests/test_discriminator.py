"""The discriminator, the adversarial losses and a run of both agree with the released code."""

import jax
import pytest
from fidelity import discriminator_deviations, training_deviations
from flax import nnx

from larp_jax.config import DiscriminatorConfig
from larp_jax.models.discriminator import Discriminator


def test_logits_and_losses_of_the_reference(reference_dir):
    deviations = discriminator_deviations(reference_dir / "discriminator")
    assert len(deviations) == 8
    assert not [d for d in deviations if not d.within]


@pytest.mark.slow
def test_twenty_steps_of_the_reference(reference_dir):
    deviations = training_deviations(reference_dir / "training")
    assert len(deviations) == 22
    assert not [d for d in deviations if not d.within]


def test_published_size():
    module = nnx.eval_shape(lambda: Discriminator(DiscriminatorConfig(), (16, 128, 128, 3), rngs=nnx.Rngs(0)))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
    # per block 12 D^2 of kernels, D + 4 D + D of biases and 4 D of norms; patches 768 D + D; class token, norm and head
    assert parameters == 12 * (12 * 512**2 + 10 * 512) + 769 * 512 + 512 + 2 * 512 + 513
    assert parameters / 1e6 == pytest.approx(38.2, abs=0.1)
