"""Frozen networks whose features a tokenizer is trained towards, or judged by (EVATok, arXiv 2603.12267).

All have the same interface, `Teacher`. They are VGG16 (arXiv 1409.1556), V-JEPA 2 (arXiv 2506.09985), VideoMAE (arXiv
2203.12602), DINOv2 (arXiv 2304.07193, registers arXiv 2309.16588) and DINOv3 (arXiv 2508.10104).
"""

import functools
from abc import abstractmethod

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from larp_jax.config.teachers import TeacherConfig
from larp_jax.errors import InputError
from larp_jax.models import vision_positions
from larp_jax.models.attention import attention
from larp_jax.models.embeddings import PatchEmbed
from larp_jax.models.layers import Dtype, LayerNorm, Linear, Mlp, project, run_stack, stack
from larp_jax.models.lpips import Vgg

# Mean and standard deviation of the pixels of ImageNet, by which all of them normalize.
MEAN = np.float32([0.485, 0.456, 0.406])
DEVIATION = np.float32([0.229, 0.224, 0.225])

Grid = tuple[int, int, int]


class Teacher(nnx.Module):
    """A network from clips to features on a grid of places (time, height, width).

    Parameters are float32, and random until trained weights are loaded (`larp_jax.weights.networks.load_teacher`).

    Attributes:
      config: sizes.
      dim: channels of the features.
      depth: number of blocks.
    """

    config: TeacherConfig
    dim: int
    depth: int

    @abstractmethod
    def __call__(self, video: jax.Array) -> jax.Array:
        """Final features, after the last norm.

        Args:
          video: [B, T, H, W, 3], floats in [0, 1]. It is resized (bilinear) to the resolution of the configuration, if
            that has one, and normalized here.

        Returns:
          [B, t, h, w, C] float32, with C = `dim` and (t, h, w) = `grid((T, H, W))`.

        Raises:
          InputError: the shape does not fit the network.
        """

    @abstractmethod
    def hidden(self, video: jax.Array, layers: tuple[int, ...]) -> tuple[jax.Array, ...]:
        """Features after blocks, before any final norm.

        Args:
          video: as for the call.
          layers: numbers of blocks from 1 to `depth`; of VGG16, of its stages, whose grids and channels differ.

        Returns:
          [B, t, h, w, C] float32 for each of `layers`.

        Raises:
          InputError: the shape does not fit, or there is no such block.
        """

    def grid(self, clip_shape: tuple[int, int, int]) -> Grid:
        """Numbers of places (t, h, w) of the features of clips (T, H, W).

        A clip of fewer frames than a patch has, such as an image, is repeated to that length.

        Raises:
          InputError: clips do not consist of whole patches.
        """
        frames, height, width = clip_shape
        tubelet, patch = self.config.traits.tubelet, self.config.patch
        if self.config.resolution:
            height = width = self.config.resolution
        if (frames > tubelet and frames % tubelet) or height % patch or width % patch or min(clip_shape) < 1:
            raise InputError(
                f"{self.config.family} needs clips whose frames are a multiple of {tubelet}, and whose height and width"
                f" are multiples of {patch} (or its resolution set); got {frames} frames of {height}x{width}"
            )
        return max(1, frames // tubelet), height // patch, width // patch

    def _resized(self, video: jax.Array) -> jax.Array:
        """The clip at the network's resolution, and at least as long as a patch."""
        if video.ndim != 5 or video.shape[-1] != 3 or not jnp.issubdtype(video.dtype, jnp.floating):
            raise InputError(f"a teacher needs floats [B, T, H, W, 3] in [0, 1]; got {video.dtype} {list(video.shape)}")
        self.grid(video.shape[1:4])  # checks the shape
        batch, frames, height, width, channels = video.shape
        if resolution := self.config.resolution:
            video = jax.image.resize(video, (batch, frames, resolution, resolution, channels), "bilinear")
        return jnp.repeat(video, self.config.traits.tubelet, axis=1) if frames < self.config.traits.tubelet else video

    def _check_layers(self, layers: tuple[int, ...]) -> None:
        if wrong := [layer for layer in layers if not 1 <= layer <= self.depth]:
            raise InputError(f"{self.config.family} has no block {wrong[0]}; choose from 1 to {self.depth}")


class VggTeacher(Teacher):
    """VGG16 up to relu4_3, frame by frame; its parameters are those of LPIPS without the last stage and the heads."""

    def __init__(self, config: TeacherConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.vgg = Vgg(config.depth, rngs=rngs, dtype=dtype)
        self.config, self.depth, self.dim = config, config.depth, self.vgg.width

    def __call__(self, video):
        """See `Teacher`; the features are rectified, not normalized."""
        return self.hidden(video, (self.depth,))[0]

    def hidden(self, video, layers):
        """See `Teacher`; block i is relui_2 for i = 1, 2 and relui_3 for i = 3, 4."""
        self._check_layers(layers)
        video = self._resized(video)
        found = self.vgg.activations(rearrange(video, "b t h w c -> (b t) h w c"))
        return tuple(rearrange(found[layer - 1], "(b t) h w c -> b t h w c", b=len(video)) for layer in layers)


class VisionBlock(nnx.Module):
    """Pre-LN block: x += scale * attention(norm(x)); x += scale * mlp(norm(x)); x in float32, scales trained or 1."""

    def __init__(self, config: TeacherConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        width, epsilon = config.width, config.traits.epsilon
        self.norm1 = LayerNorm(width, epsilon=epsilon, dtype=dtype)
        self.qkv = Linear(width, 3 * width, rngs=rngs, dtype=dtype)
        self.out = Linear(width, width, rngs=rngs, dtype=dtype)
        self.norm2 = LayerNorm(width, epsilon=epsilon, dtype=dtype)
        self.mlp = Mlp(width, config.hidden, rngs=rngs, dtype=dtype)
        self.scale1 = nnx.Param(jnp.ones((width,))) if config.traits.dino else None
        self.scale2 = nnx.Param(jnp.ones((width,))) if config.traits.dino else None
        self.heads = config.heads

    def __call__(self, x: jax.Array, key: None = None, rotation: jax.Array | None = None) -> jax.Array:
        """x [B, N, D] float32 -> the same shape; `rotation` [2, N, d] turns queries and keys. `key` is not used."""
        q, k, v = project(self.qkv, self.norm1(x), self.heads)
        if rotation is not None:
            q, k = (vision_positions.rotate(y, rotation) for y in (q, k))
        y = self.out(rearrange(attention(q, k, v), "b n h d -> b n (h d)")).astype(jnp.float32)
        x = x + (y if self.scale1 is None else y * self.scale1[...])
        y = self.mlp(x, norm=self.norm2).astype(jnp.float32)
        return x + (y if self.scale2 is None else y * self.scale2[...])


class VisionTransformer(Teacher):
    """V-JEPA 2's encoder, VideoMAE's encoder, DINOv2 or DINOv3; the latter two frame by frame.

    Class and register tokens are not part of the features. The class token contains its position.
    """

    def __init__(self, config: TeacherConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32):
        """`remat` and `dtype` are as for `make_teacher`."""
        traits, width = config.traits, config.width
        self.patches = PatchEmbed((traits.tubelet, config.patch, config.patch), 3, width, rngs=rngs, dtype=dtype)
        self.prefix_length = 1 + config.registers if traits.dino else 0
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        self.prefix = nnx.Param(0.02 * normal(rngs.params(), (self.prefix_length, width))) if traits.dino else None
        places = (config.table[1] * config.table[2], width)
        self.table = nnx.Param(0.02 * normal(rngs.params(), places)) if traits.positions == "learned" else None
        self.blocks = stack(config.depth, lambda r: VisionBlock(config, rngs=r, dtype=dtype), rngs)
        self.norm = LayerNorm(width, epsilon=traits.epsilon) if config.final_norm else None
        self.config, self.dim, self.depth, self.remat = config, width, config.depth, remat

    def __call__(self, video):
        """See `Teacher`."""
        (x,) = self.hidden(video, (self.depth,))
        return x if self.norm is None else self.norm(x)

    def hidden(self, video, layers):
        """See `Teacher`."""
        self._check_layers(layers)
        grid = self.grid(video.shape[1:4])
        x, rotation = self._embed(self._resized(video), grid)
        shared = () if rotation is None else (rotation,)
        found, start = {}, 0
        for end in sorted(set(layers)):
            x = found[end] = run_stack(self.blocks, x, shared=shared, remat=self.remat, span=(start, end))
            start = end
        t, h, w = grid
        shape = {"b": len(video), "t": t, "h": h, "w": w}
        axes = "b (t h w) d" if self.config.traits.tubelet > 1 else "(b t) (h w) d"
        return tuple(
            rearrange(found[layer][:, self.prefix_length :], f"{axes} -> b t h w d", **shape) for layer in layers
        )

    def _embed(self, video: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array | None]:
        """Tokens [sequences, N, D] float32, a sequence for each clip or frame, and the rotations of their places."""
        config = self.config
        x = self.patches((video - MEAN) / DEVIATION).astype(jnp.float32)
        rotation = None
        match config.traits.positions:
            case "rotary_3d":
                rotation = vision_positions.rotary_3d(grid, config.width // config.heads)
            case "rotary_2d":
                rotation = vision_positions.rotary_2d(grid, config.width // config.heads, self.prefix_length)
            case "sincos":
                x = x + vision_positions.sincos_flat(config.table, grid, config.width)
        if self.prefix is not None:
            x = rearrange(x, "b (t n) d -> (b t) n d", t=grid[0])
            if self.table is not None:
                smooth = config.registers > 0
                x = x + vision_positions.interpolated(self.table[...], config.table, grid, antialias=smooth)
            prefix = jnp.broadcast_to(self.prefix[...], (len(x), self.prefix_length, self.dim))
            x = jnp.concatenate([prefix, x], axis=1)
        return x, None if rotation is None else jnp.asarray(rotation)


def make_teacher(
    config: TeacherConfig, *, rngs: nnx.Rngs, remat: str = "none", dtype: Dtype = jnp.float32
) -> VggTeacher | VisionTransformer:
    """A teacher with random weights; for shapes without any memory, under `nnx.eval_shape`.

    Args:
      config: its sizes, such as `larp_jax.config.teachers.TEACHERS["vjepa2_l"]`.
      rngs: random keys of the weights.
      remat: what the gradient of the clip recomputes, as for `run_stack`; of no effect on `vgg16`.
      dtype: of the computation; norms and the residual stream stay in float32.
    """
    if config.family == "vgg16":
        return VggTeacher(config, rngs=rngs, dtype=dtype)
    return VisionTransformer(config, rngs=rngs, remat=remat, dtype=dtype)
