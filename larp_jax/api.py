"""The Python interface: trained tokenizers, which encode and decode, and trained generators, which sample codes."""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from larp_jax import files
from larp_jax.allocation import Assigner
from larp_jax.config import GeneratorConfig, GeneratorRecipe, TokenizerConfig
from larp_jax.errors import InputError
from larp_jax.models.checks import checked_integers, checked_lengths, checked_video
from larp_jax.models.condition import Condition
from larp_jax.models.generator import Generator
from larp_jax.models.int8 import quantize_kernels, quantize_layers
from larp_jax.models.paths import path_name
from larp_jax.models.pixels import as_float_video
from larp_jax.models.quantizer import code_vectors
from larp_jax.models.router import Router
from larp_jax.models.sampling import SamplingOptions, cast_params, sample_codes
from larp_jax.models.tokenizer import Tokenizer
from larp_jax.runtime import distributed, rng, sharding
from larp_jax.weights import checkpoint, importing
from larp_jax.weights.fingerprint import digest, fingerprint
from larp_jax.weights.tensors import compare_shapes

Budget = str | int | Sequence[int] | np.ndarray | None  # see `LoadedTokenizer.assign`
PRECISIONS = ("float32", "bfloat16", "int8")  # of generators that sample


def load_tokenizer(
    path: str | os.PathLike,
    *,
    weights: str = "ema",
    mesh: Mesh | None = None,
    router: str | os.PathLike | None = None,
) -> "LoadedTokenizer":
    """Loads a trained tokenizer.

    Args:
      path: a workdir (its newest checkpoint), one of its checkpoints, an imported directory, or a directory in the
        released Hugging Face layout (`config.json` and `model.safetensors`).
      weights: `ema` for the EMA weights if the checkpoint has them, `raw` for the raw weights.
      mesh: devices for the parameters and for splitting batches; the default device without.
      router: checkpoint of the router that chooses with the budget `auto`.

    Raises:
      InputError: a checkpoint does not exist, cannot be read, or is of another kind.
    """
    found = load_checkpoint(path, weights=weights)
    sampled = found.recipe.data
    return LoadedTokenizer(
        found.recipe.model,
        found.params["tokenizer"],
        step=found.step,
        mesh=mesh,
        fps=sampled.fps,
        stride=sampled.stride,
        router=None if router is None else load_router(router, weights=weights),
    )


def load_router(path: str | os.PathLike, *, weights: str = "ema") -> tuple[Router, dict]:
    """The module of a trained router, without its weights, and these; arguments and errors as for `load_tokenizer`."""
    found = load_checkpoint(path, weights=weights, kind="router")
    module = nnx.eval_shape(lambda: Router(found.recipe.model, rngs=nnx.Rngs(0)))
    return module, _checked_params(module, found.params["router"], "router")


def load_generator(
    path: str | os.PathLike, *, weights: str = "ema", precision: str = "float32", mesh: Mesh | None = None
) -> "LoadedGenerator":
    """Loads a trained generator.

    Args:
      path: as for `load_tokenizer`.
      weights: as for `load_tokenizer`.
      precision: as for `LoadedGenerator`.
      mesh: devices for the parameters and for splitting batches; the default device without.

    Raises:
      InputError: the checkpoint does not exist, cannot be read, or is not one of a generator.
    """
    found = load_checkpoint(path, weights=weights, kind="generator")
    return LoadedGenerator.of(found, precision=precision, mesh=mesh)


def load_checkpoint(
    path: str | os.PathLike, *, weights: str = "ema", kind: str | None = "tokenizer"
) -> checkpoint.Checkpoint:
    """Loads a checkpoint with its recipe and all its parameters. Arguments and errors are those of `load_tokenizer`.

    `kind` is the model that it must contain: `tokenizer`, `generator` or `router`, or None for any.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights!r} is not known; choose ema or raw")
    distributed.check_devices()
    path = files.any_path(path, "checkpoint")
    if checkpoint.newest(path) is not None or not (path / importing.WEIGHTS).exists():
        found = checkpoint.load(path, weights=weights)
    else:
        _, imported, params = importing.import_huggingface(path)
        recipe = GeneratorRecipe(model=imported) if isinstance(imported, GeneratorConfig) else imported
        found = checkpoint.Checkpoint(files.absolute(path), recipe, params, step=0, code_counts=None, mean_clip=None)
    if kind not in (None, found.recipe.stage):
        raise InputError(f"{path} holds a {found.recipe.stage}; give a {kind}")
    return found


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
        params = _checked_params(module, params, "tokenizer")
        self._params = jax.device_put(params, mesh and sharding.param_shardings(params, mesh))
        self._graphdef = nnx.graphdef(module)

        def encode(params, video, lengths, key):
            return self.module(params).quantize(as_float_video(video), lengths, key=key).indices

        def decode(params, codes, lengths):
            return jnp.clip(self.module(params).decode(codes, lengths), 0.0, 1.0)

        def reconstruct(params, video, lengths):
            return jnp.clip(self.module(params)(as_float_video(video), lengths)[0], 0.0, 1.0)

        self._encode, self._decode, self._reconstruct = jax.jit(encode), jax.jit(decode), jax.jit(reconstruct)

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
    def codebook(self) -> np.ndarray:
        """The code vectors, [K, d] float32, of unit length unless `quantizer.l2_normalized` is false.

        Raises:
          InputError: the tokenizer has continuous latents.
        """
        self._need_codes()
        return np.asarray(code_vectors(self.config.quantizer, self._params["quantizer"]["embedding"]))

    def encode(
        self, video: jax.Array | np.ndarray, key: jax.Array | None = None, *, budget: Budget = None
    ) -> Any:
        """Encodes videos to codes.

        Args:
          video: [B, T, H, W, C] uint8, or floats in [0, 1].
          key: samples codes as in training (at the configured temperature); None returns the nearest codes.
          budget: how many codes, as for `assign`; only for tokenizers with a ladder.

        Returns:
          [B, N] int32 in [0, K). From tokenizers with a ladder, a tuple: such codes, those of each clip first and then
          zeros; and their numbers by block of frames, [B, blocks] int32.

        Raises:
          ValueError: the video has another rank, size, dtype or range.
          InputError: the tokenizer has continuous latents, or the budget does not fit it.
        """
        self._need_codes()
        video, key = checked_video(video, self.config.clip_shape), None if key is None else rng.as_key(key)
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
          InputError: the budget does not fit the tokenizer, or needs a router or weights that are missing.
        """
        if not (budget is None or isinstance(budget, (str, int)) or np.ndim(budget) != 2):
            return checked_lengths(budget, self.config.adaptive, len(video), whole=True)
        name = str(budget)
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
            chosen = ladder.goal(str(budget), self.config.quantizer.codebook_size)
        else:
            chosen = ladder.largest if budget is None else ladder.checked(list(budget), "budget")
        return Assigner(self.config, chosen, self.module, self._router)

    def encode_frames(self, frames: jax.Array | np.ndarray) -> jax.Array:
        """Encodes the first frames of clips, as generators are given them: the last is held still to the clip's end.

        Args:
          frames: [B, F, H, W, C] uint8, or floats in [0, 1], with F of at least 1 and below the clip's T; F = 1 are
            pictures.

        Returns:
          [B, N] int32 in [0, K).

        Raises:
          ValueError: the frames have another rank, size, dtype or range.
        """
        total = self.config.frames
        if np.ndim(frames) != 5 or not 0 < np.shape(frames)[1] < total:
            shape = list(np.shape(frames))
            raise ValueError(f"frames must be [B, F, H, W, C] with F from 1 to {total - 1}, got shape {shape}")
        return self.encode(np.asarray(frames)[:, np.minimum(np.arange(total), np.shape(frames)[1] - 1)])

    def decode(self, codes: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray | None = None) -> jax.Array:
        """Decodes codes to videos.

        Args:
          codes: [B, N] integers in [0, K).
          lengths: of tokenizers with a ladder, the numbers of codes by block, [B, blocks] integers, as `encode` returns
            them. Those of the first blocks alone, [B, n], decode to the first frames.

        Returns:
          [B, T, H, W, C] float32 in [0, 1]; of n blocks, n / blocks of the T frames.

        Raises:
          ValueError: the codes or lengths have another rank, size, dtype or range, or do not belong together.
          InputError: the tokenizer has continuous latents.
        """
        self._need_codes()
        codes = self._checked_codes(codes)
        lengths = checked_lengths(lengths, self.config.adaptive, len(codes))
        with rng.pinned(), jax.default_matmul_precision("float32"):
            return self._decode(self._params, self._split(codes), self._split(lengths))

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
        video = checked_video(video, self.config.clip_shape)
        lengths = self.assign(video, budget)
        with rng.pinned(), jax.default_matmul_precision("float32"):
            return self._reconstruct(self._params, self._split(video), self._split(lengths))

    def _split(self, batch):
        if self._mesh is None or batch is None or len(batch) % sharding.batch_parts(self._mesh):
            return batch
        return jax.device_put(batch, sharding.batch_sharding(self._mesh))

    def _need_codes(self) -> None:
        if not self.config.quantizer.has_codes:
            raise InputError(
                "this tokenizer has continuous latents (quantizer.kind='kl') and therefore neither codes nor a codebook"
            )

    def _checked_codes(self, codes):
        return checked_integers("codes", codes, (self.config.num_tokens,), 0, self.config.quantizer.codebook_size)


class LoadedGenerator:
    """A generator with its weights.

    A sampling program is compiled for each batch size, `cfg_interval` and `window`, and with or without guidance, top-k
    and top-p. Their values, and the temperature, can change without another compilation.

    Args:
      config: configuration of the generator.
      params: its parameters (`TrainState.params["generator"]`).
      step: training step of the parameters; 0 if unknown.
      precision: `float32`, including matrix products on all devices; `bfloat16` for computation and cache; or `int8`,
        in which the weights of linear layers are int8 and the rest is float32, with matrix products in the precision
        that is fast on the device.
      mesh: devices for the parameters and for splitting batches (`data` x `fsdp`); the default device without.
      tokenizer_fingerprint: fingerprint of the tokenizer whose codes it was trained on; None if unknown.
      class_counts: [classes] int, number of training clips of each class; None if unknown.
      class_names: names of the classes in the order of their labels; empty or too few if some are unknown.

    Attributes:
      config: as given.
      step: as given.
      precision: as given.
      dtype: of the computation, except norms and softmaxes.
      parameters: their number.
      tokenizer_fingerprint: as given.
      class_counts: as given.
      class_names: as given.
    """

    @rng.pinned()
    def __init__(
        self,
        config: GeneratorConfig,
        params: Mapping,
        *,
        step: int = 0,
        precision: str = "float32",
        mesh: Mesh | None = None,
        tokenizer_fingerprint: str | None = None,
        class_counts: np.ndarray | None = None,
        class_names: Sequence[str] = (),
    ):
        if precision not in PRECISIONS:
            raise InputError(f"precision={precision!r} is not known; choose {', '.join(PRECISIONS)}")
        if class_counts is not None and not (config.has_classes and len(class_counts) == config.num_classes):
            raise InputError(f"class_counts of {len(class_counts)} classes do not match the generator")
        if len(class_names) > config.num_classes:
            raise InputError(
                f"{len(class_names)} class names do not match the generator, which has {config.num_classes} classes"
            )
        self.config, self.step, self.precision = config, step, precision
        self.tokenizer_fingerprint, self.class_counts = tokenizer_fingerprint, class_counts
        self.class_names = tuple(class_names)
        self._mesh, dtype = mesh, jnp.dtype("bfloat16" if precision == "bfloat16" else "float32")
        self.dtype, self.parameters = dtype, sum(x.size for x in jax.tree.leaves(params))
        module = nnx.eval_shape(lambda: Generator(config, rngs=nnx.Rngs(0), dtype=dtype))
        cast = cast_params(_checked_params(module, params, "generator"), dtype)
        if precision == "int8":
            quantize_layers(module)
            cast = quantize_kernels(cast)
        self._graphdef = nnx.graphdef(module)
        self._params = jax.device_put(cast, mesh and sharding.param_shardings(cast, mesh))

        def sample(params, condition, indices, key, scalars, plan):
            return sample_codes(self.module(params), condition, indices, key, scalars, plan)

        def logits(params, condition, codes):
            return self.module(params)(condition, codes[:, :-1])

        self._logits = jax.jit(logits)
        # with AVX-512, LLVM would use vectors of half its width
        options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
        self._sample = jax.jit(sample, static_argnames="plan", compiler_options=options)

    @classmethod
    def of(
        cls, found: checkpoint.Checkpoint, *, precision: str = "float32", mesh: Mesh | None = None
    ) -> "LoadedGenerator":
        """The generator of a checkpoint."""
        return cls(
            found.recipe.model,
            found.params["generator"],
            step=found.step,
            precision=precision,
            mesh=mesh,
            tokenizer_fingerprint=found.tokenizer_fingerprint,
            class_counts=found.class_counts,
            class_names=found.class_names,
        )

    @property
    def params(self) -> dict:
        """The parameters: nested dictionaries of arrays of the compute precision."""
        return self._params

    def module(self, params: Mapping) -> Generator:
        """The network with these parameters, for use in your own functions."""
        return nnx.merge(self._graphdef, params)

    @property
    def batch_multiple(self) -> int:
        """Batch sizes must be multiples of this, the number of devices that batches are split over."""
        return sharding.batch_parts(self._mesh) if self._mesh is not None else 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights at this precision, 16 hexadecimal digits."""
        return digest(f"generator {self.precision}", self._params)

    def sample(
        self,
        classes: Sequence[int] | np.ndarray | None = None,
        *,
        key: jax.Array,
        frames: jax.Array | np.ndarray | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> jax.Array:
        """Samples sequences of codes.

        Args:
          classes: [B] integers in [0, num_classes), or -1 for any class; if the generator is given classes.
          key: random key, `jax.random.key(seed)`.
          frames: [B, N] integers in [0, K), codes of the given frames from `LoadedTokenizer.encode_frames`; if the
            generator is given frames. Of a generator that is given both, either can be left out if training left it
            out sometimes (`class_dropout`, `frames_dropout`).
          indices: [B] integers of at least 0, the number of the sample in each row; 0 to B - 1 by default. A sample
            depends only on `key`, its number and its condition, not on the rest of the batch or its size. (Except for
            rounding: if two codes are almost equally likely, another batch size may select the other one.) Required
            if the generator is given neither classes nor frames.
          **options: fields of `larp_jax.models.sampling.SamplingOptions`: cfg_scale, frames_scale, cfg_interval,
            temperature, top_k, top_p, window.

        Returns:
          [B, N] int32 in [0, K).

        Raises:
          ValueError: an argument is not as described; the message states the expected and the given value.
        """
        return self.sample_counted(classes, key=key, frames=frames, indices=indices, **options)[0]

    def sample_counted(
        self,
        classes: Sequence[int] | np.ndarray | None = None,
        *,
        key: jax.Array,
        frames: jax.Array | np.ndarray | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The codes of `sample` [B, N], and the number of passes after that of the condition, an int32 scalar.

        Without a `window` there are N - 1 passes through the network, one for each code after the first.
        """
        chosen = SamplingOptions(**options)
        arguments = self._arguments(classes, frames, indices, rng.as_key(key), chosen)
        with rng.pinned(), self._precisely():
            return self._sample(*arguments, chosen.plan(self.config.num_tokens))

    def logits(
        self,
        codes: jax.Array | np.ndarray,
        classes: Sequence[int] | np.ndarray | None = None,
        *,
        frames: jax.Array | np.ndarray | None = None,
    ) -> jax.Array:
        """Logits of each of `codes` [B, N] given those before it, [B, N, K] float32; other arguments as for `sample`.

        Raises:
          ValueError: an argument is not as described.
        """
        codes = checked_integers("codes", codes, (self.config.num_tokens,), 0, self.config.codebook_size)
        numbers = np.arange(len(codes))
        params, condition, *_ = self._arguments(classes, frames, numbers, rng.key(0), SamplingOptions())
        with self._precisely():
            return self._logits(params, condition, codes)

    @rng.pinned()
    def compile(self, batch_size: int, **options: Any) -> jax.stages.Compiled:
        """The compiled program of `sample` for this batch size and these options."""
        chosen = SamplingOptions(**options)
        condition, numbers = Condition.zeros(self.config, batch_size), np.arange(batch_size)
        classes = condition.classes if self.config.has_classes else None
        arguments = self._arguments(classes, condition.frames, numbers, rng.key(0), chosen)
        with self._precisely():
            return self._sample.lower(*arguments, chosen.plan(self.config.num_tokens)).compile()

    def check_tokenizer(self, tokenizer: LoadedTokenizer) -> None:
        """`InputError` if the generator is known to have been trained with another tokenizer."""
        ours = self.config.codebook_size, self.config.num_tokens
        theirs = tokenizer.config.quantizer.codebook_size, tokenizer.config.num_tokens
        if ours != theirs:
            raise InputError(
                f"the generator samples {ours[1]} codes of {ours[0]}, the tokenizer has {theirs[1]} of {theirs[0]};"
                " give the tokenizer that the generator was trained with"
            )
        if self.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
            raise InputError(
                f"the generator was trained on codes of tokenizer {self.tokenizer_fingerprint}, not of"
                f" {tokenizer.fingerprint}; give that one"
            )

    def _precisely(self):
        return jax.default_matmul_precision("float32" if self.precision == "float32" else "default")

    def _arguments(self, classes, frames, indices, key, options: SamplingOptions) -> tuple:
        """The arguments of the compiled function, checked and placed on devices."""
        c = self.config
        both = c.has_classes and c.has_frames
        for name, given, wanted, optional in (
            ("classes", classes, c.has_classes, both and c.has_null_class and frames is not None),
            ("frames", frames, c.has_frames, both and c.has_null_frames and classes is not None),
        ):
            if (given is not None) != wanted and not (given is None and optional):
                raise ValueError(
                    f"this generator has the condition {c.given!r}: {'give' if wanted else 'leave out'} {name}"
                )
        for name, null, missing in (
            ("cfg_scale", c.has_null_class, "a null class"),
            ("frames_scale", c.has_null_frames, "frames_dropout"),
        ):
            if getattr(options, name) > 1.0 and not null:
                raise ValueError(
                    f"{name} must be 1 for a generator trained without {missing}; got {getattr(options, name):g}"
                )
        if classes is not None:
            classes = checked_integers("classes", classes, (), -1 if c.has_null_class else 0, c.num_classes)
        if frames is not None:
            frames = checked_integers("frames", frames, (c.num_tokens,), 0, c.codebook_size)
        if indices is not None:
            indices = checked_integers("indices", indices, (), 0, 2**31)
        found = {"classes": classes, "frames": frames, "indices": indices}
        rows = {name: len(values) for name, values in found.items() if values is not None}
        if len(set(rows.values())) != 1:
            said = ", ".join(f"[{count}] {name}" for name, count in rows.items()) or "none; give indices"
            raise ValueError(f"every sample needs one row of each argument; got {said}")
        count = max(rows.values())
        if indices is None:
            indices = np.arange(count, dtype=np.int32)
        if classes is None and c.given != "frames":
            classes = np.full(count, -1, np.int32)
        if frames is None and c.has_frames:
            frames = np.full((count, c.num_tokens), -1, np.int32)
        condition = Condition(classes, frames)
        if self._mesh is not None:
            sharding.check_batch(count, self._mesh)
            condition, indices = jax.device_put((condition, indices), sharding.batch_sharding(self._mesh))
        return self._params, condition, indices, key, options.scalars()


def _checked_params(module: nnx.Module, params: Mapping, kind: str) -> dict:
    """The parameters as float32 NumPy arrays; `InputError` if their names or shapes do not match the module."""

    def by_name(tree):
        return {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    expected = by_name(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    compare_shapes(expected, by_name(dict(params)), f"the settings of the {kind}")
    return jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params))
