"""The losses of both stages, in float32 (LARP, arXiv 2410.21264, sections 3.2 and 3.3; details: the released code)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from larp_jax.config import PriorConfig
from larp_jax.models.next_code import next_code
from larp_jax.models.packing import mean_of_codes
from larp_jax.models.quantizer import normalize


def reconstruction_loss(video: jax.Array, reconstruction: jax.Array, kind: str) -> jax.Array:
    """Mean absolute (`l1`) or squared (`l2`) difference over all elements, a scalar."""
    difference = video.astype(jnp.float32) - reconstruction.astype(jnp.float32)
    return jnp.mean(jnp.abs(difference) if kind == "l1" else jnp.square(difference))


def alignment_loss(features: jax.Array, target: jax.Array) -> jax.Array:
    """Minus the mean cosine between features and their targets, [..., C] each; a scalar (EVATok, arXiv 2603.12267)."""
    return -jnp.mean(jnp.sum(normalize(features) * normalize(target), axis=-1))


def prior_loss(
    prior: Callable,
    config: PriorConfig,
    z_q: jax.Array,
    indices: jax.Array,
    codebook: jax.Array,
    *,
    key: jax.Array | None,
    mix_ratio: jax.Array | float,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The cross-entropy of the prior over its rounds (section 3.3): round 1 reads the latents, later rounds a mixture.

    In a later round each position but the first is, with probability `mix_ratio`, the code vector of a token sampled
    from the previous round (scheduled sampling), else the latent with its gradient. All later rounds mix the same
    positions, as in the released code.

    Args:
      prior: `prior(latents [B, N-1, d], key=...)` -> unit vectors [B, N-1, d].
      config: rounds and temperature.
      z_q: [B, N, d] straight-through latents, through which gradients reach the encoder.
      indices: [B, N] int32 codes, the targets.
      codebook: [K, d] unit vectors.
      key: random key of dropout and sampling; None for evaluation (no dropout, and only round 1).
      mix_ratio: scalar in [0, 1].
      valid: [B, N] bool, which of the indices are codes if they are packed; the others are not predicted.

    Returns:
      The mean cross-entropy over rounds and positions 1..N-1, and round 1's `prior_top1` and `prior_top5` accuracy.
    """
    valid = None if valid is None else valid[:, 1:]
    inputs, targets = z_q[:, :-1], indices[:, 1:]
    rounds = config.rounds if key is not None else 1
    losses, first, mix_key = [], None, None
    for i in range(rounds):
        dropout_key = sample_key = None
        if key is not None:
            dropout_key, sample_key, mask_key = jax.random.split(jax.random.fold_in(key, i), 3)
            mix_key = mask_key if mix_key is None else mix_key
        predicted = prior(inputs, key=dropout_key)
        next_key = sample_key if i + 1 < rounds else None
        scored = next_code(predicted, targets, codebook, temperature=config.temperature, key=next_key)
        losses.append(mean_of_codes(scored.cross_entropy, valid))
        first = first or scored
        if i + 1 < rounds:
            inputs = mix_sampled(z_q[:, :-1], scored.sampled, codebook, key=mix_key, ratio=mix_ratio)
    metrics = {f"prior_top{n}": mean_of_codes(first.rank < n, valid) for n in (1, 5)}
    return sum(losses) / len(losses), metrics


def next_latent_loss(
    prior: Callable, z: jax.Array, *, key: jax.Array | None, valid: jax.Array | None = None
) -> jax.Array:
    """Mean squared error between predicted and actual next latents, a scalar (arXiv 2412.16326, section 3).

    Args:
      prior: as for `prior_loss`.
      z: [B, N, d] latents before quantization; inputs and targets, both with their gradients.
      key: random key of dropout; None for none.
      valid: as for `prior_loss`.
    """
    squares = jnp.square(prior(z[:, :-1], key=key) - z[:, 1:])
    return mean_of_codes(squares, None if valid is None else valid[:, 1:])


def mix_sampled(
    latents: jax.Array, sampled: jax.Array, codebook: jax.Array, *, key: jax.Array, ratio: jax.Array | float
) -> jax.Array:
    """Replaces random latents [B, n, d], but never that of position 0, by the code vectors of sampled tokens.

    Args:
      latents: positions 0..n-1 of the sequence.
      sampled: [B, n] int32; column j was sampled for token j + 1.
      codebook: [K, d]; no gradient reaches it.
      key: random key of the positions.
      ratio: probability of a replacement.
    """
    mask = jax.random.bernoulli(key, ratio, sampled.shape)
    return replace_next(latents, mask, sampled, codebook)


def replace_next(latents: jax.Array, mask: jax.Array, sampled: jax.Array, codebook: jax.Array) -> jax.Array:
    """Replaces position j + 1 of latents [B, n, d] by the code vector of sampled[:, j] where mask[:, j] is true."""
    vectors = jax.lax.stop_gradient(codebook)[sampled[:, :-1]]
    later = jnp.where(mask[:, :-1, None], vectors, latents[:, 1:])
    return jnp.concatenate([latents[:, :1], later], axis=1)


def discriminator_loss(kind: str, real: jax.Array, fake: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """The loss of the discriminator, a scalar, from its logits [B] of real clips and of reconstructions.

    Args:
      kind: `ns` (binary cross-entropy against 1 and 0), `ns_smooth` (against random targets below 1 and above 0) or
        `hinge`.
      real: logits.
      fake: logits.
      key: random key of the targets of `ns_smooth`.
    """
    if kind == "hinge":
        return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))
    real_target, fake_target = 1.0, 0.0
    if kind == "ns_smooth":
        noise = 0.15 * jnp.abs(jax.random.normal(key, (2, *real.shape)))
        real_target, fake_target = jnp.maximum(1.0 - noise[0], 0.7), jnp.minimum(noise[1], 0.3)

    def cross_entropy(logits, target):
        return jnp.mean(target * jax.nn.softplus(-logits) + (1.0 - target) * jax.nn.softplus(logits))

    return cross_entropy(real, real_target) + cross_entropy(fake, fake_target)


def adversarial_loss(kind: str, fake: jax.Array) -> jax.Array:
    """The tokenizer's adversarial loss, a scalar, from the logits [B] of its reconstructions (released: `g_loss`)."""
    return -jnp.mean(fake) if kind == "hinge" else jnp.mean(jax.nn.softplus(-fake))


def lecam_loss(real: jax.Array, fake: jax.Array, real_ema: jax.Array, fake_ema: jax.Array) -> jax.Array:
    """LeCam regularization (arXiv 2104.03310) of logits [B] against the EMAs of earlier logits, a scalar."""
    above = jax.nn.relu(jnp.mean(real) - fake_ema)
    below = jax.nn.relu(real_ema - jnp.mean(fake))
    return jnp.square(above) + jnp.square(below)


def r1_penalty(discriminator: Callable, video: jax.Array) -> jax.Array:
    """R1 (arXiv 1801.04406): the mean squared norm of the gradients of logits by their clips [B, T, H, W, C]."""
    gradient = jax.grad(lambda x: discriminator(x).sum())(video)
    return jnp.mean(jnp.sum(jnp.square(gradient), axis=(1, 2, 3, 4)))


def perceptual_loss(distance: Callable, video: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Mean perceptual distance of frames, a scalar.

    The gradient of each frame is computed together with its distance: only the features of one frame per clip are in
    memory at a time, and none are computed twice.

    Args:
      distance: `distance(frames, frames)` of two arrays [B, H, W, C], [B].
      video: [B, T, H, W, C].
      reconstruction: as video; the only argument with a gradient.
    """

    def compare(x):
        frames = tuple(jnp.moveaxis(y, 1, 0) for y in (video, x))
        distances, gradients = jax.lax.map(
            lambda pair: jax.value_and_grad(lambda frame: distance(pair[0], frame).mean())(pair[1]), frames
        )
        return distances.mean(), jnp.moveaxis(gradients, 0, 1) / video.shape[1]

    return eager_gradient(compare, reconstruction)


def eager_gradient(value_and_gradient: Callable, x: jax.Array) -> jax.Array:
    """A scalar function of x whose gradient is computed together with its value, so that no activations are kept.

    The backward pass of a sum of losses keeps the activations of all of them at once; losses computed like this release
    theirs one after the other. There are no second derivatives.

    Args:
      value_and_gradient: function of x that returns (scalar, array like x).
      x: any array.
    """
    value, gradient = jax.lax.stop_gradient(value_and_gradient(jax.lax.stop_gradient(x)))
    return _with_gradient(value, gradient, x)


def started(condition: jax.Array, loss: Callable, x: jax.Array) -> jax.Array:
    """loss(x), a scalar, if the condition is true; else 0, without computing the loss."""

    def zero(x):
        return jnp.zeros(()), jnp.zeros_like(x)

    return eager_gradient(lambda x: jax.lax.cond(condition, jax.value_and_grad(loss), zero, x), x)


@jax.custom_jvp
def _with_gradient(value: jax.Array, gradient: jax.Array, x: jax.Array) -> jax.Array:
    return value


@_with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    value, gradient, _ = primals
    return value, jnp.vdot(gradient, tangents[2])
