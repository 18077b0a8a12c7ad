"""The bottleneck of the tokenizer: stochastic vector quantization (SVQ), plain VQ, or a KL-regularized Gaussian.

See LARP, arXiv 2410.21264, section 3.2.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from larp_jax.config import QuantizerConfig
from larp_jax.models.categorical import argmax, sample
from larp_jax.models.chunks import map_token_chunks
from larp_jax.models.layers import LayerNorm, Linear
from larp_jax.models.packing import layout, mean_of_codes

KMEANS_ROUNDS = 10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Output of the bottleneck. All arrays are float32 except the indices.

    Attributes:
      z: [B, N, d], the latents before quantization: unit vectors, or the outputs of `project` if `l2_normalized` is
        false; the means for the KL bottleneck.
      z_q: [B, N, d], input of the decoder, straight-through: the values are code vectors, the gradient goes to z.
      indices: [B, N] int32 codes; None for the KL bottleneck.
      loss: scalar, the weighted bottleneck loss (`loss_q` of the released code).
      terms: the unweighted terms of the loss by name, scalars.
      lengths: [B, T] int32, the numbers of codes by block if the codes are packed; None if all clips have N.
      kl: [B, N] nats, the KL divergence of each token's Gaussian from the standard normal distribution; None for codes.
    """

    z: jax.Array
    z_q: jax.Array
    indices: jax.Array | None
    loss: jax.Array
    terms: dict[str, jax.Array]
    lengths: jax.Array | None = None
    kl: jax.Array | None = None

    @property
    def tokens(self) -> jax.Array:
        """What a clip is encoded to: its codes, or for the KL bottleneck `z_q`, which are the means without a key."""
        return self.z_q if self.indices is None else self.indices

    @property
    def valid(self) -> jax.Array | None:
        """[B, N] bool, which of the indices are codes; None if all are."""
        return None if self.lengths is None else layout(self.lengths, self.z.shape[1]).valid


def normalize(x: jax.Array) -> jax.Array:
    """x / max(||x||, 1e-12) over the last axis, with a zero (not NaN) gradient at x = 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def similarities(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Inner products [..., d] x [K, d] -> [..., K] in full float32 on every device (TPUs would round to bfloat16)."""
    return jnp.einsum("...d,kd->...k", z, codebook, precision=jax.lax.Precision.HIGHEST)


class Quantizer(nnx.Module):
    """in_linear -> norm -> latents -> codes -> out_linear, always in float32.

    Args:
      config: kind and options.
      encoder_width: width of the inputs.
      decoder_width: width of the outputs.
      num_tokens: N, needed only for `norm="ln_nd"`.
      rngs: `params` stream for the initial weights.
    """

    def __init__(
        self,
        config: QuantizerConfig,
        encoder_width: int,
        decoder_width: int,
        num_tokens: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        projected = config.code_dim if config.has_codes else 2 * config.code_dim
        self.in_norm = LayerNorm(encoder_width, epsilon=1e-5) if config.input_norm == "layer" else None
        self.in_linear = Linear(encoder_width, projected, rngs=rngs)
        widths = {"ln_d": projected, "ln_nd": num_tokens * projected}
        self.norm = None if config.norm == "none" else LayerNorm(widths[config.norm], epsilon=1e-5)
        self.out_linear = Linear(config.code_dim, decoder_width, rngs=rngs)
        if config.kind == "kl":
            self.embedding = None
        else:
            bound = (6.0 / config.code_dim) ** 0.5  # Kaiming-uniform with fan-in d
            shape = (config.codebook_size, config.code_dim)
            self.embedding = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))

    @property
    def codebook(self) -> jax.Array:
        """The code vectors [K, d], see `code_vectors`."""
        return code_vectors(self.config, self.embedding[...])

    def project(self, h: jax.Array) -> jax.Array:
        """Encoder outputs [B, N, D] -> outputs of in_linear and the norm after it, [B, N, d] (2 d for KL)."""
        h = h.astype(jnp.float32)
        projected = self.in_linear(h if self.in_norm is None else self.in_norm(h))
        if self.config.norm == "none":
            return projected
        flat = projected.reshape(len(h), -1) if self.config.norm == "ln_nd" else projected
        return self.norm(flat).reshape(projected.shape)

    def __call__(
        self,
        projected: jax.Array,
        *,
        key: jax.Array | None = None,
        temperature: jax.Array | float | None = None,
        share: jax.Array | float = 1.0,
        lengths: jax.Array | None = None,
    ) -> Quantized:
        """Quantizes [B, N, d].

        Args:
          projected: from `project`.
          key: random key of sampling (`svq`, `kl`); None for deterministic codes (evaluation).
          temperature: sampling temperature tau; that of the configuration by default.
          share: weight of the codes in `z_q`, from 0 (only the latents) to 1 (only the codes); no effect for `kl`.
          lengths: [B, T] int32 if the latents are packed; losses are means over codes, and the indices of padding 0.
        """
        if self.config.kind == "kl":
            return self._gaussian(projected, key, lengths)
        z = normalize(projected) if self.config.l2_normalized else projected
        codebook = self.codebook
        if self.config.kind != "svq":
            key = None
        temperature = self.config.temperature if temperature is None else temperature
        indices = nearest_codes(
            z, codebook, key=key, temperature=temperature, l2_normalized=self.config.l2_normalized
        )
        valid = None
        if lengths is not None:
            valid = layout(lengths, z.shape[1]).valid
            indices = jnp.where(valid, indices, 0)
        codes = codebook[indices]
        commitment = mean_of_codes(jnp.square(jax.lax.stop_gradient(codes) - z), valid)
        codebook_loss = mean_of_codes(jnp.square(codes - jax.lax.stop_gradient(z)), valid)
        loss = self.config.commitment_weight * commitment + self.config.codebook_weight * codebook_loss
        terms = {"commitment": commitment, "codebook": codebook_loss}
        if self.config.entropy_weight:
            terms["entropy"] = entropy_loss(z, codebook, self.config.entropy_temperature, valid)
            loss = loss + self.config.entropy_weight * terms["entropy"]
        z_q = z + share * jax.lax.stop_gradient(codes - z)
        return Quantized(z=z, z_q=z_q, indices=indices, loss=loss, terms=terms, lengths=lengths)

    def _gaussian(self, projected, key, lengths):
        valid = True if lengths is None else layout(lengths, projected.shape[1]).valid[..., None]
        if lengths is not None:  # padding becomes the standard normal distribution, whose divergence is 0
            projected = jnp.where(valid, projected, 0.0)
        mean, log_variance = mean_and_log_variance(projected)
        divergence = mean**2 + jnp.exp(log_variance) - 1.0 - log_variance
        kl = 0.5 * jnp.sum(divergence, axis=(1, 2)).mean()
        z_q = mean
        if key is not None:
            z_q = reparameterize(mean, log_variance, valid * jax.random.normal(key, mean.shape))
        tokens = 0.5 * divergence.sum(axis=-1)
        loss = self.config.kl_weight * kl
        return Quantized(z=mean, z_q=z_q, indices=None, loss=loss, terms={"kl": kl}, lengths=lengths, kl=tokens)

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """Codes [B, N] int32 -> code vectors [B, N, d]; for the KL bottleneck, latents [B, N, d] -> the same."""
        return self.codebook[tokens] if self.config.has_codes else tokens

    def expand(self, z_q: jax.Array) -> jax.Array:
        """Latents [B, N, d] -> [B, N, decoder width], before positions."""
        return self.out_linear(z_q)


def code_vectors(config: QuantizerConfig, embedding: jax.Array) -> jax.Array:
    """The codebook of a table [K, d]: its rows scaled to unit length, or unchanged if `l2_normalized` is false."""
    return normalize(embedding) if config.l2_normalized else embedding


def kmeans_codebook(
    config: QuantizerConfig, latents: jax.Array, key: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """A codebook [K, d] by k-means of latents [B, N, d]: Lloyd's algorithm, initialized with random latents.

    Centers have unit length if the configuration normalizes latents. A center that is nearest to no latent is kept.
    Latents that are padding, where `valid` [B, N] is false, are left out.
    """
    size, flat = config.codebook_size, latents.reshape(-1, latents.shape[-1])
    if valid is None:
        start = jax.random.choice(key, flat, (size,), replace=size > len(flat))
    else:
        order = jnp.argsort(jnp.where(valid.reshape(-1), jax.random.uniform(key, (len(flat),)), 2.0))
        start = flat[order[jnp.arange(size) % valid.sum()]]
    # noise separates latents that were selected twice
    start = code_vectors(config, start + 1e-3 * jax.random.normal(key, start.shape))

    def improve(_, codes):
        nearest = nearest_codes(latents, codes, l2_normalized=config.l2_normalized)
        if valid is not None:
            nearest = jnp.where(valid, nearest, size)  # segments above the number of segments are dropped
        nearest = nearest.reshape(-1)
        sums = jax.ops.segment_sum(flat, nearest, size)
        counts = jax.ops.segment_sum(jnp.ones(len(flat)), nearest, size)[:, None]
        return jnp.where(counts > 0, code_vectors(config, sums / jnp.maximum(counts, 1.0)), codes)

    return jax.lax.fori_loop(0, KMEANS_ROUNDS, improve, start)


def mean_and_log_variance(projected: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Parameters of a Gaussian in [B, N, 2 d]: the mean [B, N, d] and the log-variance [B, N, d], clipped to [-30, 20].

    They are in the even and in the odd columns.
    """
    return projected[..., ::2], jnp.clip(projected[..., 1::2], -30.0, 20.0)


def reparameterize(mean: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """A sample of the Gaussian from standard normal noise; all arrays have the same shape."""
    return mean + jnp.exp(0.5 * log_variance) * noise


def nearest_codes(
    z: jax.Array,
    codebook: jax.Array,
    *,
    key: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    l2_normalized: bool = True,
) -> jax.Array:
    """The nearest code of each latent or, with a key, a code sampled from softmax(z . E^T / temperature).

    Args:
      z: [B, N, d] latents.
      codebook: [K, d] code vectors.
      key: random key of sampling, for unit vectors only.
      temperature: sampling temperature tau.
      l2_normalized: whether latents and code vectors are unit vectors; the nearest code is then the one with the
        largest cosine.

    Returns:
      [B, N] int32.
    """
    z, codebook = jax.lax.stop_gradient((z, codebook))

    def pick(i, z):
        if not l2_normalized:
            return argmax(affinities(z, codebook))
        logits = similarities(z, codebook)
        if key is not None:
            return sample(jax.random.fold_in(key, i), logits / temperature)
        return argmax(logits)

    return map_token_chunks(pick, z)


def affinities(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Negative squared distances [B, N, K] between latents [B, N, d] and codes [K, d], without the term |z|^2.

    That term is the same for all codes, so neither the nearest code nor a softmax over codes depends on it.
    """
    return 2.0 * similarities(z, codebook) - jnp.sum(jnp.square(codebook), axis=-1)


def entropy_loss(
    z: jax.Array, codebook: jax.Array, temperature: float, valid: jax.Array | None = None
) -> jax.Array:
    """Mean entropy of each token's softmax(-D / temperature) minus the entropy of their mean, as in the released code.

    D are the squared distances between latents [B, N, d] and codes [K, d]; for unit vectors, -D is twice the cosine up
    to a constant. The loss is in [-log K, log K], and small if each token is assigned to one code with certainty and
    all codes are used equally. Latents that are padding, where `valid` [B, N] is false, are left out; all clips count
    the same.
    """
    real = jnp.ones(z.shape[:2], bool) if valid is None else valid
    weights = real / (len(z) * jnp.maximum(real.sum(axis=1, keepdims=True), 1))  # their sum is 1

    def entropies(_, z, weights):
        log_probs = jax.nn.log_softmax(affinities(z, codebook) / temperature, axis=-1)
        probs = jnp.exp(log_probs)
        return -weights * jnp.sum(probs * log_probs, axis=-1), jnp.einsum("bn,bnk->nk", weights, probs)[None]

    sample_entropy, mean_probs = map_token_chunks(entropies, z, weights)
    mean_probs = mean_probs.sum(axis=(0, 1))
    return sample_entropy.sum() + jnp.sum(mean_probs * jnp.log(mean_probs + 1e-5))
