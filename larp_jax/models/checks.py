"""Checks of the arrays that users pass to the Python interface."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from larp_jax.config import Ladder, TokenizerConfig
from larp_jax.config.checks import check_positions
from larp_jax.errors import InputError


def checked_shape(shape: tuple[int, ...], config: TokenizerConfig) -> tuple[int, ...]:
    """Checks the shape [T, H, W, C] of clips that a tokenizer is to encode or decode, and returns it.

    It takes its own, and if it is holistic also frames of any other height and width that divide into patches, and
    without a ladder fewer frames that do.

    Raises:
      InputError: it does not take this shape.
    """
    own = config.clip_shape
    if shape == own:
        return own
    expected = f"[{', '.join(map(str, own))}]"
    if not config.is_patchwise:
        unit, side, _ = config.clip_unit
        frames = own[:1] if config.ladder else range(unit, own[0] + 1, unit)
        expected += f", or T from {list(frames)} and H and W multiples of {side}"
        if shape[0] in frames and shape[3:] == own[3:] and all(n > 0 and n % side == 0 for n in shape[1:3]):
            patch = map(min, config.encoder_patch, config.decoder_patch)
            check_positions(math.prod(shape[:3]) // math.prod(patch) + config.num_tokens, "the patches of a clip")
            return shape
    raise InputError(f"clips must be {expected}, got {list(shape)}")


def checked_clip_shape(
    config: TokenizerConfig, size: int | tuple[int, int] | None, *, fewer_frames: bool = False
) -> tuple[int, ...]:
    """The shape [T, H, W, C] of clips of this size, (H, W) or the side of a square; None for that of a tokenizer.

    Raises:
      InputError: the tokenizer does not take it, or with `fewer_frames` clips of fewer frames.
    """
    frames, *own, channels = config.clip_shape
    height, width = own if size is None else (size, size) if isinstance(size, int) else size
    if fewer_frames:
        checked_shape((config.clip_unit[0], height, width, channels), config)
    return checked_shape((frames, height, width, channels), config)


def checked_clips(video, config: TokenizerConfig) -> np.ndarray | jax.Array:
    """`checked_video` of clips of any shape that a tokenizer takes, see `checked_shape`."""
    shape = np.shape(video)
    return checked_video(video, checked_shape(shape[1:], config) if len(shape) == 5 else config.clip_shape)


def checked_video(video, clip_shape: tuple[int, ...]) -> np.ndarray | jax.Array:
    """Checks a video [B, *clip_shape]; floats are returned as float32, uint8 unchanged.

    Raises:
      ValueError: it has another rank, size, dtype or range.
    """
    expected = f"[B, {', '.join(map(str, clip_shape))}] of uint8, or floats in [0, 1]"
    video = video if isinstance(video, jax.Array) else np.asarray(video)
    if video.ndim != 5 or video.shape[1:] != clip_shape or not len(video):
        raise ValueError(f"a video must be {expected}, got shape {list(video.shape)}")
    if video.dtype == np.uint8:
        return video
    if not jnp.issubdtype(video.dtype, jnp.floating):
        raise ValueError(f"a video must be {expected}, got {video.dtype}")
    low, high = float(video.min()), float(video.max())
    if not (low >= 0.0 and high <= 1.0):  # written this way to also reject NaN
        raise ValueError(f"a video must be {expected}, got values from {low:g} to {high:g}")
    return video.astype(np.float32)


def checked_lengths(lengths, ladder: Ladder | None, rows: int, *, whole: bool = False) -> np.ndarray | None:
    """Checks numbers of codes by block and returns them as int32 [rows, blocks]; None without a ladder.

    Args:
      lengths: [rows, n] integers, of all blocks or of the first; None without a ladder.
      ladder: that of the tokenizer; None if it has none.
      rows: number of clips.
      whole: whether all blocks must be given.

    Raises:
      ValueError: they have another shape or dtype, are not of the ladder, or exceed its bucket.
    """
    if ladder is None:
        if lengths is not None:
            raise ValueError("this tokenizer has no ladder and gives every clip the same number of codes")
        return None
    if lengths is None:
        raise ValueError("this tokenizer has a ladder: give the lengths that encode returned with the codes")
    blocks = np.shape(lengths)[-1] if np.ndim(lengths) == 2 else 0
    if not 0 < blocks <= ladder.blocks or len(lengths) != rows or (whole and blocks < ladder.blocks):
        others = "" if whole else ", or those of the first blocks"
        raise ValueError(f"lengths must be [{rows}, {ladder.blocks}]{others}; got shape {list(np.shape(lengths))}")
    lengths = np.asarray(checked_integers("lengths", lengths, (blocks,), ladder.rungs[0], ladder.rungs[-1] + 1))
    wrong = ~np.isin(lengths, ladder.rungs).all(axis=1) | (lengths.sum(axis=1) > ladder.bucket)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"lengths {lengths[row].tolist()} of row {row} must be of the ladder {list(ladder.rungs)}, and at most"
            f" {ladder.bucket} together"
        )
    return lengths


def checked_integers(name: str, values, row: tuple[int, ...], low: int, high: int) -> np.ndarray | jax.Array:
    """Checks integers in [low, high) and returns them as int32 [B, *row]."""
    expected = f"[{', '.join(map(str, ('B', *row)))}] of integers in [{low}, {high})"
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if values.ndim != 1 + len(row) or values.shape[1:] != row or not len(values):
        raise ValueError(f"{name} must be {expected}, got shape {list(values.shape)}")
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} must be {expected}, got {values.dtype}")
    lowest, highest = int(values.min()), int(values.max())
    if lowest < low or highest >= high:
        raise ValueError(f"{name} must be {expected}, got values from {lowest} to {highest}")
    return values.astype(np.int32)


def checked_latents(latents, row: tuple[int, int]) -> np.ndarray | jax.Array:
    """Checks latents, finite floats [B, *row], and returns them as float32.

    Raises:
      ValueError: they have another shape or dtype, or are not finite.
    """
    expected = f"[B, {', '.join(map(str, row))}] of finite floats"
    latents = latents if isinstance(latents, jax.Array) else np.asarray(latents)
    if latents.ndim != 3 or latents.shape[1:] != row or not len(latents):
        raise ValueError(f"latents must be {expected}, got shape {list(latents.shape)}")
    if not jnp.issubdtype(latents.dtype, jnp.floating):
        raise ValueError(f"latents must be {expected}, got {latents.dtype}")
    if not jnp.isfinite(latents).all():
        raise ValueError(f"latents must be {expected}, got values that are not finite")
    return latents.astype(np.float32)
