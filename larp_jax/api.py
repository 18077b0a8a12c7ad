"""The Python interface: a trained tokenizer as an object that encodes and decodes."""

import functools
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from larp_jax import checkpoint, importing
from larp_jax.config import GeneratorRecipe, TokenizerConfig
from larp_jax.errors import InputError
from larp_jax.fingerprint import fingerprint
from larp_jax.models.quantizer import normalize
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.steps import as_float_video


def load_tokenizer(path: str | os.PathLike, *, weights: str = "ema") -> "LoadedTokenizer":
    """Loads a trained tokenizer.

    Args:
      path: a workdir (its newest checkpoint), one of its checkpoints, an imported directory, or a directory in the
        released Hugging Face layout (`config.json` and `model.safetensors`).
      weights: `ema` for the moving average where one was kept, `raw` for the trained weights themselves.

    Raises:
      InputError: there is no such checkpoint, it cannot be read, or it is no tokenizer.
    """
    found = load_checkpoint(path, weights=weights)
    return LoadedTokenizer(found.recipe.model, found.params["tokenizer"], step=found.step)


def load_checkpoint(
    path: str | os.PathLike, *, weights: str = "ema", kind: str | None = "tokenizer"
) -> checkpoint.Checkpoint:
    """What `load_tokenizer` takes, with its recipe and all its parameters. Arguments and errors are the same.

    `kind` is what it must hold: `tokenizer`, `generator`, or None for either.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights!r} is not known; choose ema or raw")
    path = pathlib.Path(path)
    if checkpoint.newest(path) is not None or not (path / importing.WEIGHTS).exists():
        found = checkpoint.load(path, weights=weights)
    else:
        held, recipe, params = importing.import_huggingface(path)
        recipe = GeneratorRecipe(model=recipe) if held == "generator" else recipe
        found = checkpoint.Checkpoint(path.absolute(), recipe, params, step=0, code_counts=None, mean_clip=None)
    if kind not in (None, found.recipe.stage):
        raise InputError(f"{path} holds a {found.recipe.stage}; give a {kind}")
    return found


class LoadedTokenizer:
    """A tokenizer with its weights.

    Everything is computed in float32, matrix products included, whatever the training computed in: codes should not
    depend on the device. Each new batch size is compiled once.

    Args:
      config: the tokenizer's.
      params: its parameters (`TrainState.params["tokenizer"]`).
      step: training step they are of; 0 where unknown.

    Attributes:
      config: as given.
      step: as given.
    """

    def __init__(self, config: TokenizerConfig, params: Mapping, *, step: int = 0):
        self.config, self.step = config, step
        self._params = jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params)))
        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0))))

        def encode(params, video, key):
            return self.module(params).quantize(as_float_video(video), key=key).indices

        def decode(params, codes):
            return jnp.clip(self.module(params).decode(codes), 0.0, 1.0)

        def reconstruct(params, video):
            return jnp.clip(self.module(params)(as_float_video(video))[0], 0.0, 1.0)

        self._encode, self._decode, self._reconstruct = map(jax.jit, (encode, decode, reconstruct))

    @property
    def params(self) -> dict:
        """The parameters: nested dictionaries of float32 arrays on the default device."""
        return self._params

    def module(self, params: Mapping) -> Tokenizer:
        """The network with these parameters, for use in functions of one's own."""
        return nnx.merge(self._graphdef, params)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names what the codes mean: tokenizers of one fingerprint can decode each other's (16 hex digits)."""
        return fingerprint(self.config, self._params)

    @functools.cached_property
    def codebook(self) -> np.ndarray:
        """The code vectors, [K, d] float32 of unit length.

        Raises:
          InputError: the tokenizer has continuous latents.
        """
        self._need_codes()
        return np.asarray(normalize(self._params["quantizer"]["embedding"]))

    def encode(self, video: jax.Array | np.ndarray, key: jax.Array | None = None) -> jax.Array:
        """Videos to codes.

        Args:
          video: [B, T, H, W, C] uint8, or floats in [0, 1].
          key: draws codes at random as in training (at the configuration's temperature); None gives the nearest codes.

        Returns:
          [B, N] int32 in [0, K).

        Raises:
          ValueError: the video is of another rank, size, dtype or range.
          InputError: the tokenizer has continuous latents.
        """
        self._need_codes()
        with jax.default_matmul_precision("float32"):
            return self._encode(self._params, self._checked_video(video), key)

    def decode(self, codes: jax.Array | np.ndarray) -> jax.Array:
        """Codes to videos.

        Args:
          codes: [B, N] integers in [0, K).

        Returns:
          [B, T, H, W, C] float32 in [0, 1].

        Raises:
          ValueError: the codes are of another rank, size, dtype or range.
          InputError: the tokenizer has continuous latents.
        """
        self._need_codes()
        with jax.default_matmul_precision("float32"):
            return self._decode(self._params, self._checked_codes(codes))

    def reconstruct(self, video: jax.Array | np.ndarray) -> jax.Array:
        """Videos through the bottleneck and back in one pass; with continuous latents, through their means.

        Args:
          video: as for `encode`.

        Returns:
          [B, T, H, W, C] float32 in [0, 1].

        Raises:
          ValueError: as for `encode`.
        """
        with jax.default_matmul_precision("float32"):
            return self._reconstruct(self._params, self._checked_video(video))

    def _need_codes(self) -> None:
        if self.config.quantizer.kind == "kl":
            raise InputError(
                "this tokenizer has continuous latents (quantizer.kind='kl') and so neither codes nor codebook"
            )

    def _checked_video(self, video):
        expected = f"[B, {', '.join(map(str, self.config.clip_shape))}] of uint8, or floats in [0, 1]"
        video = video if isinstance(video, jax.Array) else np.asarray(video)
        if video.ndim != 5 or video.shape[1:] != self.config.clip_shape or not len(video):
            raise ValueError(f"a video must be {expected}, got shape {list(video.shape)}")
        if video.dtype == np.uint8:
            return video
        if not jnp.issubdtype(video.dtype, jnp.floating):
            raise ValueError(f"a video must be {expected}, got {video.dtype}")
        low, high = float(video.min()), float(video.max())
        if not (low >= 0.0 and high <= 1.0):  # said like this, NaN is refused too
            raise ValueError(f"a video must be {expected}, got values from {low:g} to {high:g}")
        return video.astype(np.float32)

    def _checked_codes(self, codes):
        size = self.config.quantizer.codebook_size
        expected = f"[B, {self.config.num_tokens}] of integers in [0, {size})"
        codes = codes if isinstance(codes, jax.Array) else np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.config.num_tokens or not len(codes):
            raise ValueError(f"codes must be {expected}, got shape {list(codes.shape)}")
        if not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ValueError(f"codes must be {expected}, got {codes.dtype}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= size:
            raise ValueError(f"codes must be {expected}, got values from {low} to {high}")
        return codes.astype(np.int32)
