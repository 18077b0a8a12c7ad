"""Reconstruction metrics and codebook statistics, as values per clip and mergeable sums.

An average over a data set is accumulated as a sum and a count, merged over batches and processes, and divided at the
end, because a mean of batch means would be wrong if the last batch is padded. The per-clip functions are pure and run
under `jax.jit` in float32; accumulators are on the host, in float64 and int64.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.errors import InputError

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2  # (K1 * data range)^2; range 1
SSIM_C2 = 0.03**2  # (K2 * data range)^2
SMALLEST_MSE = 1e-10  # identical clips get 100 dB, because infinity would make every average infinite

Array = jax.Array | np.ndarray


def psnr(x: Array, y: Array) -> jax.Array:
    """Peak signal-to-noise ratio of each clip, over all its pixels at once.

    Args:
      x: [B, ...] in [0, 1].
      y: as x. Clamp reconstructions to [0, 1] first, as is done for published numbers.

    Returns:
      [B] float32 in dB; 100 for identical clips.
    """
    _check_same_shape("psnr", x, y)
    difference = jnp.asarray(x, jnp.float32) - jnp.asarray(y, jnp.float32)
    mse = jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))
    return -10.0 * jnp.log10(jnp.maximum(mse, SMALLEST_MSE))


def ssim(x: Array, y: Array) -> jax.Array:
    """Structural similarity (Wang et al. 2004) of each clip: the mean over its frames.

    The Gaussian window has 11 x 11 pixels and sigma 1.5. Only windows that are completely inside the frame are used,
    covariances are population covariances, and the mean is over positions and color channels.

    Args:
      x: [B, T, H, W, C] in [0, 1], H and W at least 11.
      y: as x.

    Returns:
      [B] float32 in [-1, 1].

    Raises:
      InputError: the shapes differ, or a frame is smaller than the window.
    """
    _check_same_shape("ssim", x, y)
    height, width = x.shape[2:4]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {height}x{width}; leave it out of the "
            "metrics, or evaluate at a larger size"
        )
    rows, columns = _filter_matrix(height).T, _filter_matrix(width)

    def smooth(planes):
        # The separable filter as two matrix products: over ten times faster on CPUs than a convolution of one channel.
        planes = jnp.matmul(planes, columns, precision=jax.lax.Precision.HIGHEST)
        return jnp.einsum("ih,...hw->...iw", rows, planes, precision=jax.lax.Precision.HIGHEST)

    def frame_ssim(frames):
        x, y = (jnp.moveaxis(jnp.asarray(frame, jnp.float32), -1, 1) for frame in frames)  # [B, C, H, W]
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = smooth(jnp.stack([x, y, x * x, y * y, x * y]))
        product = mean_x * mean_y
        squares = mean_x * mean_x + mean_y * mean_y
        luminance = (2.0 * product + SSIM_C1) / (squares + SSIM_C1)
        structure = (2.0 * (mean_xy - product) + SSIM_C2) / (mean_xx + mean_yy - squares + SSIM_C2)
        return jnp.mean(luminance * structure, axis=(1, 2, 3))

    # One frame of every clip at a time, to save memory. The batch axis can stay sharded.
    per_frame = jax.lax.map(frame_ssim, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(y, 1, 0)))  # [T, B]
    return jnp.mean(per_frame, axis=0)


def _filter_matrix(size: int) -> np.ndarray:
    """[size, size - 10] float32: multiplication by it applies the Gaussian window to an axis, full windows only."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    distance = np.arange(size)[:, None] - np.arange(size - SSIM_WINDOW + 1)
    inside = (distance >= 0) & (distance < SSIM_WINDOW)
    return np.where(inside, window[np.clip(distance, 0, SSIM_WINDOW - 1)], 0.0).astype(np.float32)


def code_counts(indices: jax.Array, codebook_size: int, mask: jax.Array | None = None) -> jax.Array:
    """Counts each code along the last axis.

    Args:
      indices: [..., N] int codes in [0, codebook_size).
      codebook_size: K.
      mask: broadcastable to indices; 1 counts a code, 0 leaves it out.

    Returns:
      [..., K] int32.
    """
    weights = jnp.ones(indices.shape, jnp.int32) if mask is None else jnp.broadcast_to(mask, indices.shape)
    rows = indices.reshape(-1, indices.shape[-1])
    counts = jnp.zeros((rows.shape[0], codebook_size), jnp.int32)
    counts = counts.at[jnp.arange(rows.shape[0])[:, None], rows].add(weights.reshape(rows.shape).astype(jnp.int32))
    return counts.reshape(*indices.shape[:-1], codebook_size)


def codebook_usage(counts: Array) -> Array:
    """Fraction of codes that occur at least once: [..., K] counts -> [...] in [0, 1]."""
    return (counts > 0).mean(axis=-1)


def entropy(counts: Array) -> Array:
    """Entropy of the histogram: [..., K] counts -> [...] in nats, from 0 to log K; 0 for an empty histogram.

    NumPy counts are computed in float64, JAX counts in float32.
    """
    xp, dtype = (np, np.float64) if isinstance(counts, np.ndarray) else (jnp, jnp.float32)
    counts = counts.astype(dtype)
    probs = counts / xp.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return -(probs * xp.log(xp.where(probs > 0, probs, 1))).sum(axis=-1)


def perplexity(counts: Array) -> Array:
    """Exponential of the entropy, the effective number of used codes: [..., K] counts -> [...] in [1, K]."""
    h = entropy(counts)
    return np.exp(h) if isinstance(counts, np.ndarray) else jnp.exp(h)


def kl_from_uniform(counts: Array) -> Array:
    """Kullback-Leibler divergence of the histogram from the uniform one: [..., K] counts -> [...] in nats."""
    return np.log(counts.shape[-1]) - entropy(counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean as a sum and a count; a pytree, so that jitted functions can return it.

    Attributes:
      total: sum of the values.
      count: number of values.
    """

    total: Array | float
    count: Array | float

    @classmethod
    def empty(cls) -> Self:
        """The mean of no values."""
        return cls(np.float64(0), np.float64(0))

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> Self:
        """The mean of values [B]. `mask` [B] is 1 for real values and 0 for padding, which is ignored even if NaN."""
        if mask is None:
            mask = jnp.ones(values.shape, jnp.bool)
        return cls(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32))

    def merge(self, other: Self) -> Self:
        """The mean of the values of both, on the host in float64: float32 would lose precision in long evaluations."""
        total, count = np.float64(self.total), np.float64(self.count)
        return type(self)(total + np.float64(other.total), count + np.float64(other.count))

    def compute(self) -> float:
        """The mean; NaN if there are no values."""
        return float(self.total) / float(self.count) if self.count else float("nan")


@dataclasses.dataclass(frozen=True)
class CodeStatistics:
    """Counts of every code at every token position, on the host.

    Attributes:
      counts: [N, K] int64.
    """

    counts: np.ndarray

    @classmethod
    def empty(cls, num_tokens: int, codebook_size: int) -> Self:
        """Statistics of no codes."""
        return cls(np.zeros((num_tokens, codebook_size), np.int64))

    @classmethod
    def of(cls, indices: np.ndarray, codebook_size: int, mask: np.ndarray | None = None) -> Self:
        """Statistics of codes [B, N] in [0, codebook_size); negative ones are left out.

        `mask` [B] is 1 for real clips and 0 for padding.
        """
        indices = np.asarray(indices)
        if mask is not None:
            indices = indices[np.asarray(mask, bool)]
        num_tokens = indices.shape[1]
        cells = indices.astype(np.int64) + np.arange(num_tokens) * codebook_size
        counts = np.bincount(cells[indices >= 0], minlength=num_tokens * codebook_size)
        return cls(counts.reshape(num_tokens, codebook_size))

    def merge(self, other: Self) -> Self:
        """Statistics of the codes of both."""
        return type(self)(self.counts + other.counts)

    def compute(self) -> dict[str, float]:
        """`usage`, `perplexity` and `kl_from_uniform` over all positions, and the mean `position_entropy` in nats.

        If the mean entropy of the codes at one position is far below the entropy over all positions, different
        positions use different codes.
        """
        overall, seen = self.counts.sum(axis=0), self.counts.any(axis=1)
        return {
            "usage": float(codebook_usage(overall)),
            "perplexity": float(perplexity(overall)),
            "kl_from_uniform": float(kl_from_uniform(overall)),
            "position_entropy": float(self.position_entropy()[seen].mean()) if seen.any() else 0.0,
        }

    def position_entropy(self) -> np.ndarray:
        """Entropy of the codes at each position in nats, [N]."""
        return np.asarray(entropy(self.counts))


def _check_same_shape(name: str, x: Array, y: Array) -> None:
    if x.shape != y.shape:
        raise InputError(f"{name} compares clips of the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
