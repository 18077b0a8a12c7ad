"""Trained tokenizers, which encode videos and decode codes or latents."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from larp_jax.api.generator import checked_params
from larp_jax.budgets import Assigner
from larp_jax.config import AUTO, TokenizerConfig
from larp_jax.errors import InputError
from larp_jax.models.checks import (
    checked_clips,
    checked_integers,
    checked_latents,
    checked_lengths,
    checked_shape,
    checked_video,
)
from larp_jax.models.layers import Memory
from larp_jax.models.pixels import as_float_video
from larp_jax.models.quantizer import code_vectors
from larp_jax.models.router import Router
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import rng, sharding
from larp_jax.weights.fingerprint import decoder_fingerprint, fingerprint

Budget = str | int | Sequence[int] | np.ndarray | None  # see `LoadedTokenizer.assign`


def blocks_of(config: TokenizerConfig, frames: int) -> int | None:
    """The number of blocks that so many given frames are; None without a ladder.

    Raises:
      InputError: they are not whole blocks, nor a picture, or nothing is left to sample.
    """
    size = config.frames // config.blocks
    if not config.ladder:
        return None
    if frames != 1 and (frames % size or not 0 < frames < config.frames):
        whole = ", ".join(str(size * count) for count in range(1, config.blocks))
        raise InputError(f"{frames} given frames are no whole blocks of this tokenizer; give 1 (a picture), or {whole}")
    return -(-frames // size)


def in_blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Parts [B, n, ...] of any n as parts of n = size; the last frame is repeated at the end."""
    waiting = None
    for part in parts:
        if np.ndim(part) != 5:
            raise ValueError(f"frames must be [B, n, H, W, C], got shape {list(np.shape(part))}")
        waiting = part if waiting is None else np.concatenate([waiting, part], axis=1)
        while waiting.shape[1] >= size:
            yield waiting[:, :size]
            waiting = waiting[:, size:]
    if waiting is not None and waiting.shape[1]:
        yield waiting[:, np.minimum(np.arange(size), waiting.shape[1] - 1)]


class LoadedTokenizer:
    """A tokenizer with its weights.

    All computation is in float32, including matrix products and independent of the training precision, so that codes do
    not depend on the device. Each new batch size is compiled once.

    Args:
      config: configuration of the tokenizer.
      params: its parameters (`TrainState.params["tokenizer"]`).
      step: training step of the parameters; 0 if unknown.
      mesh: devices for the parameters and for splitting batches whose size is divisible; the default device without.
      fps: rate at which its training clips were sampled; 0 for those of the videos.
      stride: every how many frames one was taken.
      router: the module and parameters that choose with the budget `auto`, from `load_router`.

    Attributes:
      config: as given.
      step: as given.
      fps: as given.
      stride: as given.
    """

    @rng.pinned()
    def __init__(
        self,
        config: TokenizerConfig,
        params: Mapping,
        *,
        step: int = 0,
        mesh: Mesh | None = None,
        fps: float = 0.0,
        stride: int = 1,
        router: tuple[Router, Mapping] | None = None,
    ):
        self.config, self.step, self._mesh, self.fps, self.stride = config, step, mesh, fps, stride
        self._router = router
        self._assigners: dict[str, tuple] = {}  # parameters and compiled function of each budget
        module = nnx.eval_shape(lambda: Tokenizer(config, rngs=nnx.Rngs(0)))
        params = checked_params(module, params, "tokenizer")
        self._params = jax.device_put(params, mesh and sharding.param_shardings(params, mesh))
        self._graphdef = nnx.graphdef(module)

        def encode(params, video, lengths, key):
            return self.module(params).quantize(as_float_video(video), lengths, key=key).tokens

        def decode(params, codes, lengths, shape):
            return jnp.clip(self.module(params).decode(codes, lengths, shape), 0.0, 1.0)

        def reconstruct(params, video, lengths):
            return jnp.clip(self.module(params)(as_float_video(video), lengths)[0], 0.0, 1.0)

        def encode_block(params, frames, lengths, past):
            return self.module(params).encode_block(as_float_video(frames), lengths, past)

        def decode_block(params, codes, lengths, past):
            frames, memory = self.module(params).decode_block(codes, lengths, past)
            return jnp.clip(frames, 0.0, 1.0), memory

        self._encode, self._reconstruct = jax.jit(encode), jax.jit(reconstruct)
        self._decode = jax.jit(decode, static_argnames="shape")
        self._encode_block, self._decode_block = jax.jit(encode_block), jax.jit(decode_block)

    @property
    def params(self) -> dict:
        """The parameters: nested dictionaries of float32 arrays on the default device."""
        return self._params

    def module(self, params: Mapping) -> Tokenizer:
        """The network with these parameters, for use in your own functions."""
        return nnx.merge(self._graphdef, params)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the meaning of codes (16 hexadecimal digits): tokenizers with the same one can share codes."""
        return fingerprint(self.config, self._params)

    @functools.cached_property
    def decoder_fingerprint(self) -> str:
        """Identifies the decoder, which may differ between tokenizers with one fingerprint (`trained=decoder`)."""
        return decoder_fingerprint(self._params)

    @functools.cached_property
    def codebook(self) -> np.ndarray:
        """The code vectors, [K, d] float32, of unit length unless `quantizer.l2_normalized` is false.

        Raises:
          InputError: the tokenizer has continuous latents.
        """
        if not self.config.quantizer.has_codes:
            raise InputError("this tokenizer has continuous latents (quantizer.kind='kl') and therefore no codebook")
        return np.asarray(code_vectors(self.config.quantizer, self._params["quantizer"]["embedding"]))

    def encode(
        self, video: jax.Array | np.ndarray, key: jax.Array | None = None, *, budget: Budget = None
    ) -> Any:
        """Encodes videos to codes, or to continuous latents if the tokenizer has these.

        The number of codes does not depend on the size of clips: positions follow the coordinates of patches, in time
        from the first frame on (as the authors' `encode_eval`), and within a frame from edge to edge. A model that was
        trained on one size only is best at this size.

        Args:
          video: [B, T, H, W, C] uint8, or floats in [0, 1]. Besides those of `config.clip_shape`, H and W may be any
            multiples of the patches; and T may be lower, a multiple of them in time, if there is no ladder.
          key: samples codes (at the configured temperature) or latents as in training; None returns the nearest codes
            or the means of the latents.
          budget: how many codes, as for `assign`; only for tokenizers with a ladder.

        Returns:
          [B, N] int32 in [0, K), or latents [B, N, d] float32. From tokenizers with a ladder, a tuple: such codes,
          those of each clip first and then zeros; and their numbers by block of frames, [B, blocks] int32.

        Raises:
          ValueError: the video has another rank, size, dtype or range.
          InputError: the budget does not fit the tokenizer.
        """
        video, key = checked_clips(video, self.config), None if key is None else rng.as_key(key)
        lengths = self.assign(video, budget)
        with rng.pinned(), jax.default_matmul_precision("float32"):
            codes = self._encode(self._params, self._split(video), self._split(lengths), key)
        return codes if lengths is None else (codes, lengths)

    def assign(self, video: jax.Array | np.ndarray, budget: Budget = None) -> np.ndarray | None:
        """How many codes each block of frames of each clip gets.

        Args:
          video: [B, T, H, W, C], as for `encode`.
          budget: text as for `--budget`, such as "128", "32,64,32,32", "bits=1024", "auto" or "greedy:30"; a number of
            codes; the numbers of each block, for all clips [blocks] or each [B, blocks]; or None for the most codes in
            equal blocks.

        Returns:
          [B, blocks] int32; None if the tokenizer has no ladder and therefore the same number of codes for every clip.

        Raises:
          InputError: the budget does not fit the tokenizer or the size of the clips, or needs a router or weights that
            are missing.
        """
        if not (budget is None or isinstance(budget, (str, int)) or np.ndim(budget) != 2):
            return checked_lengths(budget, self.config.adaptive, len(video), whole=True)
        name = str(budget)
        if name == AUTO and np.shape(video)[1:] != self.config.clip_shape:
            own, got = ("x".join(map(str, shape[:3])) for shape in (self.config.clip_shape, np.shape(video)[1:]))
            raise InputError(f"budget auto: the router is for clips of {own}, not {got}; give a number of codes")
        if name not in self._assigners:
            assigner = self.assigner(budget)
            self._assigners[name] = assigner.params, jax.jit(assigner)
        params, assign = self._assigners[name]
        with rng.pinned(), jax.default_matmul_precision("float32"):
            lengths = assign({"tokenizer": self._params, **params}, self._split(video))
        return None if lengths is None else np.asarray(lengths)

    def assigner(self, budget: Budget = None) -> Assigner:
        """What `assign` computes, as a function that can be traced.

        Args:
          budget: as for `assign`, but not with a row for each clip.

        Raises:
          InputError: as for `assign`.
        """
        ladder, chosen = self.config.adaptive, None
        if ladder is None:
            if budget is not None:
                raise InputError(
                    f"budget {budget}: this tokenizer has no model.ladder and gives every clip"
                    f" {self.config.num_tokens} codes; leave it out"
                )
        elif isinstance(budget, (str, int)):
            chosen = ladder.goal(str(budget), self.config.quantizer.codes)
        else:
            chosen = ladder.largest if budget is None else ladder.checked(list(budget), "budget")
        return Assigner(self.config, chosen, self.module, self._router)

    def encode_frames(self, frames: jax.Array | np.ndarray, *, budget: Budget = None) -> Any:
        """Encodes the first frames of clips, as generators are given them: the last is held still to the clip's end.

        Tokenizers with a ladder encode them as the first blocks of a clip.

        Args:
          frames: [B, F, H, W, C] uint8, or floats in [0, 1], with F of at least 1 and below the clip's T; F = 1 are
            pictures. With a ladder, other F must be the frames of whole blocks, and a picture is a block held still.
          budget: how many codes, as for `assign`; only for tokenizers with a ladder.

        Returns:
          [B, N] int32 in [0, K), or latents [B, N, d] float32. From tokenizers with a ladder, a tuple: packed codes
          [B, N], and the numbers of codes of the given blocks, [B, n] int32.

        Raises:
          ValueError: the frames have another rank, size, dtype or range.
          InputError: the frames are not those of whole blocks, or the budget does not fit.
        """
        total = self.config.frames
        if np.ndim(frames) != 5 or not 0 < np.shape(frames)[1] < total:
            shape = list(np.shape(frames))
            raise ValueError(f"frames must be [B, F, H, W, C] with F from 1 to {total - 1}, got shape {shape}")
        given = np.shape(frames)[1]
        count = blocks_of(self.config, given)
        video = np.asarray(frames)[:, np.minimum(np.arange(total), given - 1)]
        if count is None:
            return self.encode(video)
        codes, lengths = self.encode(video, budget=budget)
        return codes, lengths[:, :count]

    def decode(
        self,
        codes: jax.Array | np.ndarray,
        lengths: jax.Array | np.ndarray | None = None,
        *,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> jax.Array:
        """Decodes codes, or latents if the tokenizer has these, to videos.

        Args:
          codes: [B, N] integers in [0, K), or latents [B, N, d] floats.
          lengths: of tokenizers with a ladder, the numbers of codes by block, [B, blocks] integers, as `encode` returns
            them. Those of the first blocks alone, [B, n], decode to the first frames.
          frames: T, if the clips were encoded from fewer frames than `config.clip_shape` has.
          size: (H, W), if it is not that of `config.clip_shape`.

        Returns:
          [B, T, H, W, C] float32 in [0, 1]; of n blocks, n / blocks of the T frames.

        Raises:
          ValueError: the codes or lengths have another rank, size, dtype or range, or do not belong together.
          InputError: the tokenizer does not decode to such frames.
        """
        codes = self._checked_codes(codes, self.config.num_tokens)
        lengths = checked_lengths(lengths, self.config.adaptive, len(codes))
        own = self.config.clip_shape
        shape = checked_shape((frames or own[0], *(size or own[1:3]), own[3]), self.config)[:3]
        with rng.pinned(), jax.default_matmul_precision("float32"):
            return self._decode(self._params, self._split(codes), self._split(lengths), shape)

    def encode_block(
        self, frames: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray, past: Sequence[Memory] = ()
    ) -> tuple[jax.Array, tuple[Memory, ...]]:
        """Encodes one block of frames, given what the encoder keeps of the blocks of the clip before it.

        Args:
          frames: [B, T / blocks, H, W, C] uint8, or floats in [0, 1].
          lengths: [B] integers, numbers of codes of the ladder.
          past: what this method returned for the block before; empty for the first of a clip.

        Returns:
          Codes [B, R] int32, or latents [B, R, d] float32, where R is the largest number of the ladder, 0 after those
          of the block; and the new past.

        Raises:
          ValueError: an argument is not as described.
          InputError: the tokenizer has no ladder.
        """
        config, lengths = self.config, self._checked_block(lengths, past)
        frames = checked_video(frames, (config.frames // config.blocks, *config.clip_shape[1:]))
        with rng.pinned(), jax.default_matmul_precision("float32"):
            codes, memory = self._encode_block(self._params, frames, lengths, tuple(past))
        return codes, (*past, memory)

    def decode_block(
        self, codes: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray, past: Sequence[Memory] = ()
    ) -> tuple[jax.Array, tuple[Memory, ...]]:
        """Decodes what `encode_block` returns, block after block, to frames [B, T / blocks, H, W, C] float32 in [0, 1].

        Args:
          codes: [B, R] integers, or latents [B, R, d] floats.
          lengths: [B] integers.
          past: what this method returned for the block before; empty for the first of a clip.

        Returns:
          The frames and the new past.

        Raises:
          ValueError: an argument is not as described.
          InputError: the tokenizer has no ladder.
        """
        config, lengths = self.config, self._checked_block(lengths, past)
        codes = self._checked_codes(codes, config.query_rows)
        with rng.pinned(), jax.default_matmul_precision("float32"):
            frames, memory = self._decode_block(self._params, codes, lengths, tuple(past))
        return frames, (*past, memory)

    def encode_stream(
        self, frames: Iterable[np.ndarray], *, budget: str | int | Sequence[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Encodes videos of any length block by block, in memory that does not grow; blocks do not overlap.

        With a ladder, codes of a block are those that `encode` returns for its clip, T frames each from the start on,
        and there are as soon as the block is. Without one, a block is a whole clip.

        Args:
          frames: consecutive parts of B videos, [B, n, H, W, C] each as for `encode`, with any n.
          budget: as for `assign`, but the same for all clips: neither `auto` nor `greedy`, which need whole clips.

        Yields:
          For each block its codes, [B, n] int32, or latents, [B, n, d] float32. A block that is not complete at the
          end holds its last frame still.

        Raises:
          ValueError: frames are not as described.
          InputError: the budget does not fit the tokenizer.
        """
        assignment, config = self.assigner(budget).fixed, self.config
        if config.ladder and assignment is None:
            raise InputError(f"budget {budget} depends on whole clips; give numbers of codes to encode block by block")
        past: tuple[Memory, ...] = ()
        for number, block in enumerate(in_blocks(frames, config.frames // config.blocks)):
            if assignment is None:
                yield np.asarray(self.encode(block))
                continue
            place = number % config.blocks
            length = assignment[place]
            codes, past = self.encode_block(block, np.full(len(block), length), past if place else ())
            yield np.asarray(codes)[:, :length]

    def decode_stream(self, codes: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Decodes what `encode_stream` yields, block by block.

        Args:
          codes: of each block, [B, n] integers in [0, K), or latents [B, n, d] floats.

        Yields:
          The frames of each block, [B, F, H, W, C] float32 in [0, 1].

        Raises:
          ValueError: codes are not as described.
        """
        config = self.config
        past: tuple[Memory, ...] = ()
        for number, block in enumerate(codes):
            if not config.ladder:
                yield np.asarray(self.decode(block))
                continue
            lengths = np.full(len(block), block.shape[1])
            more = max(0, config.query_rows - block.shape[1])
            padded = np.pad(block, ((0, 0), (0, more), *((0, 0),) * (block.ndim - 2)))
            frames, past = self.decode_block(padded, lengths, past if number % config.blocks else ())
            yield np.asarray(frames)

    def reconstruct(self, video: jax.Array | np.ndarray, *, budget: Budget = None) -> jax.Array:
        """Encodes and decodes videos in one pass; continuous latents are replaced by their means.

        Args:
          video: as for `encode`.
          budget: as for `encode`.

        Returns:
          [B, T, H, W, C] float32 in [0, 1].

        Raises:
          ValueError: as for `encode`.
        """
        video = checked_clips(video, self.config)
        lengths = self.assign(video, budget)
        with rng.pinned(), jax.default_matmul_precision("float32"):
            return self._reconstruct(self._params, self._split(video), self._split(lengths))

    def _split(self, batch):
        if self._mesh is None or batch is None or len(batch) % sharding.batch_parts(self._mesh):
            return batch
        return jax.device_put(batch, sharding.batch_sharding(self._mesh))

    def _checked_block(self, lengths, past: Sequence[Memory]):
        """Lengths [B] of the block after `past`, as int32."""
        ladder = self.config.adaptive
        if ladder is None:
            raise InputError("this tokenizer has no blocks of frames; give one that was trained with model.ladder")
        if len(past) >= ladder.blocks:
            raise ValueError(f"a clip has {ladder.blocks} blocks; begin the next one with an empty past")
        found = checked_lengths(np.asarray(lengths)[:, None], ladder, len(lengths))
        return None if found is None else found[:, 0]

    def _checked_codes(self, codes, count: int):
        q = self.config.quantizer
        if not q.has_codes:
            return checked_latents(codes, (count, q.code_dim))
        return checked_integers("codes", codes, (count,), 0, q.codebook_size)
