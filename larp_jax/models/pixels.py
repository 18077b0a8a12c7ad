"""Pixels as networks and as files have them."""

import jax
import jax.numpy as jnp
import numpy as np


def as_float_video(video: jax.Array) -> jax.Array:
    """uint8 [B, T, H, W, C] -> float32 in [0, 1]; floats pass."""
    return video.astype(jnp.float32) / 255.0 if video.dtype == jnp.uint8 else video


def hold_last_frame(video: jax.Array | np.ndarray, frames: int) -> jax.Array | np.ndarray:
    """Clips [B, T, ...] whose frames after the first `frames` repeat the last of these: what prediction starts from."""
    if not 0 < frames < video.shape[1]:
        raise ValueError(f"frames must be at least 1 and fewer than the clip's {video.shape[1]}, got {frames}")
    return video[:, np.minimum(np.arange(video.shape[1]), frames - 1)]


def to_uint8(video: np.ndarray) -> np.ndarray:
    """[0, 1] floats (clamped here, NaN made 0) -> uint8."""
    return np.asarray(np.clip(np.nan_to_num(np.asarray(video)), 0.0, 1.0) * 255.0 + 0.5, np.uint8)
