"""Conversions of pixels between uint8 and float32, and clips for frame prediction."""

import jax
import jax.numpy as jnp
import numpy as np


def as_float_video(video: jax.Array) -> jax.Array:
    """uint8 [B, T, H, W, C] -> float32 in [0, 1]; floats are returned unchanged."""
    return video.astype(jnp.float32) / 255.0 if video.dtype == jnp.uint8 else video


def hold_last_frame(video: jax.Array | np.ndarray, frames: int) -> jax.Array | np.ndarray:
    """Clips [B, T, ...] with the last of the first `frames` frames repeated to the end, the input of prediction."""
    if not 0 < frames < video.shape[1]:
        raise ValueError(f"frames must be at least 1 and fewer than the clip's {video.shape[1]}, got {frames}")
    return video[:, np.minimum(np.arange(video.shape[1]), frames - 1)]


def to_uint8(video: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint8; values outside are clamped, and NaN becomes 0."""
    return np.asarray(np.clip(np.nan_to_num(np.asarray(video)), 0.0, 1.0) * 255.0 + 0.5, np.uint8)
