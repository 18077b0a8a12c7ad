"""Trained generators, which sample codes or latents."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from larp_jax.config import AUTO, FlowConfig, GeneratorConfig, TokenizerConfig
from larp_jax.errors import InputError
from larp_jax.models.checks import checked_integers, checked_latents, checked_lengths
from larp_jax.models.condition import Condition
from larp_jax.models.flow import Flow
from larp_jax.models.flow_sampling import SampledLatents, sample_latents
from larp_jax.models.generator import Generator
from larp_jax.models.int8 import quantize_kernels, quantize_layers
from larp_jax.models.paths import path_name
from larp_jax.models.sampling import First, Sampled, SamplingOptions, cast_params, sample_codes
from larp_jax.models.sequence import join, known_symbols
from larp_jax.runtime import rng, sharding
from larp_jax.weights import checkpoint
from larp_jax.weights.fingerprint import digest
from larp_jax.weights.tensors import compare_shapes

Budget = str | int | Sequence[int]  # see `LoadedGenerator.sample`
PRECISIONS = ("float32", "bfloat16", "int8")  # of generators that sample
NO_FRAMES = (
    "this generator samples clips without what was before them; give one that was trained with"
    " model.condition='class+frames' or 'frames', or on codes of a tokenizer with model.ladder"
)


class HasCodes(Protocol):
    """What a generator needs to know of a `larp_jax.api.LoadedTokenizer`."""

    config: TokenizerConfig

    @property
    def fingerprint(self) -> str:
        """Identifies its weights."""


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
      class_codes: mean number of codes of the training clips of each class, with a ladder; empty if unknown.
      given_frames: how many frames it was given in training; 0 for none, or if unknown.

    Attributes:
      config: as given.
      step: as given.
      precision: as given.
      dtype: of the computation, except norms and softmaxes.
      parameters: their number.
      tokenizer_fingerprint: as given.
      class_counts: as given.
      class_names: as given.
      class_codes: as given.
      given_frames: as given.
    """

    network: type[Any] = Generator
    config: GeneratorConfig

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
        class_codes: Sequence[float | None] = (),
        given_frames: int = 0,
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
        self.class_names, self.class_codes = tuple(class_names), tuple(class_codes)
        self.given_frames = given_frames
        self._mesh, dtype = mesh, jnp.dtype("bfloat16" if precision == "bfloat16" else "float32")
        self.dtype, self.parameters = dtype, sum(x.size for x in jax.tree.leaves(params))
        module = nnx.eval_shape(lambda: self.network(config, rngs=nnx.Rngs(0), dtype=dtype))
        cast = cast_params(checked_params(module, params, "generator"), dtype)
        if precision == "int8":
            quantize_layers(module)
            cast = quantize_kernels(cast)
        self._graphdef = nnx.graphdef(module)
        self._params = jax.device_put(cast, mesh and sharding.param_shardings(cast, mesh))

        def sample(params, condition, indices, key, scalars, known, plan, first=None):
            return sample_codes(self.module(params), condition, indices, key, scalars, plan, known, first)

        def logits(params, condition, codes, lengths):
            tokens = codes if lengths is None else join(config, codes, lengths)
            return self.module(params)(condition, tokens[:, :-1], lengths)

        self._logits = jax.jit(logits)
        # with AVX-512, LLVM would use vectors of half its width
        options = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
        self._sample = jax.jit(sample, static_argnames="plan", compiler_options=options)

    @classmethod
    def of(
        cls, found: checkpoint.Checkpoint, *, precision: str = "float32", mesh: Mesh | None = None
    ) -> "LoadedGenerator":
        """The generator of a checkpoint; one of latents if it holds that."""
        kind: Any = cls if found.recipe.model.has_codes else functools.partial(LoadedFlow, statistics=found.statistics)
        return kind(
            found.recipe.model,
            found.params["generator"],
            step=found.step,
            precision=precision,
            mesh=mesh,
            tokenizer_fingerprint=found.tokenizer_fingerprint,
            class_counts=found.class_counts,
            class_names=found.class_names,
            class_codes=found.class_codes,
            given_frames=found.recipe.given_frames,
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
        frames: jax.Array | np.ndarray | tuple | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        budget: Budget = AUTO,
        **options: Any,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Samples sequences of codes.

        Args:
          classes: [B] integers in [0, num_classes), or -1 for any class; if the generator is given classes.
          key: random key, `jax.random.key(seed)`.
          frames: what `LoadedTokenizer.encode_frames` returns for given frames: [B, N] integers in [0, K), if the
            generator is given frames. They can be left out if training left them out sometimes (`frames_dropout`), and
            so can the classes of a generator that is given both (`class_dropout`), but not both. A generator with a
            ladder goes on from any first blocks: their packed codes [B, N] and lengths [B, n].
          indices: [B] integers of at least 0, the number of the sample in each row; 0 to B - 1 by default. A sample
            depends only on `key`, its number and its condition, not on the rest of the batch or its size. (Except for
            rounding: if two codes are almost equally likely, another batch size may select the other one.) Required
            if the generator is given neither classes nor frames.
          budget: how many codes each block of frames gets, if the generator has a ladder: `auto`, as many as it samples
            itself; or the same for all samples: a number of codes in equal blocks, T numbers, or either as text.
          **options: fields of `larp_jax.models.sampling.SamplingOptions`: cfg_scale, frames_scale, cfg_interval,
            temperature, top_k, top_p, window.

        Returns:
          [B, N] int32 in [0, K). If the generator has a ladder, these codes packed (those of all blocks one after the
          other, then zeros) and the number of codes of each block, [B, T] int32.

        Raises:
          ValueError: an argument is not as described; the message states the expected and the given value.
        """
        sampled = self.sample_counted(classes, key=key, frames=frames, indices=indices, budget=budget, **options)
        codes, *lengths = sampled.arrays.values()
        return (codes, lengths[0]) if lengths else codes

    def sample_counted(
        self,
        classes: Sequence[int] | np.ndarray | None = None,
        *,
        key: jax.Array,
        frames: jax.Array | np.ndarray | tuple | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        budget: Budget = AUTO,
        **options: Any,
    ) -> Sampled | SampledLatents:
        """What `sample` returns, and the number of passes after that of the condition, an int32 scalar.

        Without a `window` there is one pass for each code, or length, after the first.
        """
        chosen = SamplingOptions(**options)
        arguments = self._arguments(classes, frames, indices, rng.as_key(key), chosen, budget)
        with rng.pinned(), self._precisely():
            return self._sample(*arguments, chosen.plan(self.config.symbols))

    def sample_block(
        self,
        classes: Sequence[int] | np.ndarray | None = None,
        *,
        key: jax.Array,
        frames: jax.Array | np.ndarray | tuple | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        budget: Budget = AUTO,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Samples one block of frames, the one after given first blocks, with a program for all blocks.

        Block after block with one key, these are the codes that `sample` returns, except for rounding. The class may
        be another one for each block. Without a ladder, the block of a generator that is given frames is a clip.

        Args:
          classes: as for `sample`.
          key: as for `sample`.
          frames: packed codes [B, N] and lengths [B, n] of the first n blocks, below the T of a clip; None for none.
            Without a ladder, as for `sample`.
          indices: as for `sample`.
          budget: as for `sample`.
          **options: as for `sample`; with a ladder without `cfg_interval` and `window`.

        Returns:
          Packed codes [B, N] and lengths [B, n + 1] int32, of the given blocks and this one. Without a ladder, what
          `sample` returns, and N as the length of each row, [B, 1].

        Raises:
          ValueError: as for `sample`.
          InputError: the generator has no ladder and is given no frames, or an option is for whole clips.
        """
        ladder, chosen = self.config.adaptive, SamplingOptions(**options)
        if ladder is None:
            if not self.config.has_frames:
                raise InputError(NO_FRAMES)
            tokens = self.sample(classes, key=key, frames=frames, indices=indices, budget=budget, **options)
            return tokens, np.full((len(tokens), 1), self.config.num_tokens, np.int32)
        if chosen.cfg_interval >= 0:
            raise InputError(f"cfg_interval {chosen.cfg_interval} counts the codes of whole clips; leave it out")
        *arguments, known = self._arguments(classes, frames, indices, rng.as_key(key), chosen, budget)
        own = np.zeros((len(known), 0), np.int32) if frames is None else np.asarray(frames[1])
        count = own.shape[1]
        if count == ladder.blocks:
            raise ValueError(f"the given frames are all {count} blocks of a clip; none is left to sample")
        lengths = np.pad(own, ((0, 0), (0, ladder.blocks - count))).astype(np.int32)
        if self._mesh is not None:
            lengths = jax.device_put(lengths, sharding.batch_sharding(self._mesh))
        with rng.pinned(), self._precisely():
            first = First(jnp.asarray(lengths), jnp.int32(count))
            found = self._sample(*arguments, known, chosen.plan(self.config.symbols), first)
        return found.codes, found.lengths[:, : count + 1]

    def logits(
        self,
        codes: jax.Array | np.ndarray,
        classes: Sequence[int] | np.ndarray | None = None,
        *,
        frames: jax.Array | np.ndarray | None = None,
        lengths: jax.Array | np.ndarray | None = None,
    ) -> jax.Array:
        """Logits of each of `codes` [B, N] given those before it, [B, N, K] float32; other arguments as for `sample`.

        With `lengths` [B, T], of packed codes, they are those of each symbol of the sequence, [B, N + T, K + ladder]:
        the number of codes of a block, then its codes. -inf is for symbols that cannot stand there.

        Raises:
          ValueError: an argument is not as described.
        """
        c = self.config
        codes = checked_integers("codes", codes, (c.num_tokens,), 0, c.codebook_size)
        if (lengths is None) == bool(c.ladder):
            raise ValueError(f"lengths {'must be given for' if c.ladder else 'do not apply to'} this generator")
        lengths = checked_lengths(lengths, c.adaptive, len(codes), whole=True)
        numbers = np.arange(len(codes))
        params, condition, *_ = self._arguments(classes, frames, numbers, rng.key(0), SamplingOptions())
        with self._precisely():
            return self._logits(params, condition, codes, lengths)

    @rng.pinned()
    def compile(self, batch_size: int, **options: Any) -> jax.stages.Compiled:
        """The compiled program of `sample` for this batch size and these options."""
        chosen = SamplingOptions(**options)
        condition, numbers = Condition.zeros(self.config, batch_size), np.arange(batch_size)
        classes = condition.classes if self.config.has_classes else None
        arguments = self._arguments(classes, condition.frames, numbers, rng.key(0), chosen)
        with self._precisely():
            return self._sample.lower(*arguments, chosen.plan(self.config.symbols)).compile()

    def check_tokenizer(self, tokenizer: HasCodes) -> None:
        """`InputError` if the generator is known to have been trained with another tokenizer."""
        self._check_sizes(tokenizer.config)
        if self.tokenizer_fingerprint not in (None, tokenizer.fingerprint):
            raise InputError(
                f"the generator was trained on codes of tokenizer {self.tokenizer_fingerprint}, not of"
                f" {tokenizer.fingerprint}; give that one"
            )

    def _check_sizes(self, tokenizer: TokenizerConfig) -> None:
        """`InputError` unless it samples what such a tokenizer decodes."""
        if not tokenizer.quantizer.has_codes:
            raise InputError("the generator samples codes, and the tokenizer has continuous latents; give another")
        ours = self.config.codebook_size, self.config.num_tokens, self.config.adaptive
        theirs = tokenizer.quantizer.codebook_size, tokenizer.num_tokens, tokenizer.adaptive
        if ours[:2] == theirs[:2] and ours != theirs:
            own, other = (f"{x.blocks} blocks of {x.rungs} codes" if x else "no ladder" for x in (ours[2], theirs[2]))
            raise InputError(
                f"the generator has {own}, the tokenizer {other}; give the one that the generator was trained with"
            )
        if ours != theirs:
            raise InputError(
                f"the generator samples {ours[1]} codes of {ours[0]}, the tokenizer has {theirs[1]} of {theirs[0]};"
                " give the tokenizer that the generator was trained with"
            )

    def assignment(self, budget: Budget, options: SamplingOptions) -> tuple[int, ...] | None:
        """The number of codes of each block by a budget, 0 where it is sampled; None without a ladder.

        Raises:
          InputError: it is no budget of this generator, or the options do not apply to a generator with a ladder.
        """
        ladder = self.config.adaptive
        if ladder is None:
            if not _is_auto(budget):
                raise InputError(f"budget {budget}: all samples of this generator have as many codes; leave it out")
            return None
        if options.window > 1:
            raise InputError(
                f"window {options.window}: a generator with a ladder draws one code after the other, because a drafted"
                " length would move all codes after it; leave it out"
            )
        return (0,) * ladder.blocks if _is_auto(budget) else ladder.named(budget, self.config.codebook_size)

    def _precisely(self):
        return jax.default_matmul_precision("float32" if self.precision == "float32" else "default")

    def _known(self, given: tuple[int, ...] | None, first: tuple | None, rows: int) -> jax.Array | None:
        """The symbols that a result of `assignment` and first blocks give, see `sequence.known_symbols`."""
        ladder = self.config.adaptive
        if ladder is None or given is None:
            return None
        lengths = np.tile(np.asarray(given, np.int32), (rows, 1))
        if first is None:
            return known_symbols(self.config, jnp.asarray(lengths))
        codes, own = first
        own = np.asarray(checked_lengths(own, ladder, rows))
        lengths[:, : own.shape[1]] = own
        least = int(np.where(lengths > 0, lengths, ladder.rungs[0]).sum(axis=1).max())
        if least > ladder.bucket:
            raise InputError(
                f"the given frames leave no room for the blocks after them: with these they need {least} codes of"
                f" {ladder.bucket}; give the frames fewer codes"
            )
        return known_symbols(self.config, jnp.asarray(lengths), jnp.asarray(codes), own.shape[1])

    def _arguments(self, classes, frames, indices, key, options: SamplingOptions, budget=AUTO) -> tuple:
        """The arguments of the compiled function, checked and placed on devices."""
        c, first = self.config, None
        options.fitting(c)
        if c.ladder and frames is not None:
            first = checked_integers("codes of frames", frames[0], (c.num_tokens,), 0, c.codebook_size), frames[1]
            frames = None
        both = c.has_classes and c.has_frames
        for name, given, wanted, optional in (
            ("classes", classes, c.has_classes, both and c.has_null_class and frames is not None),
            ("frames", frames, c.has_frames, c.has_null_frames and not (both and classes is None)),
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
            frames = self._checked_frames(frames)
        if indices is not None:
            indices = checked_integers("indices", indices, (), 0, 2**31)
        found = {"classes": classes, "frames": first[0] if first else frames, "indices": indices}
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
            frames = Condition.zeros(c, count).without_frames().frames
        condition, known = Condition(classes, frames), self._known(self.assignment(budget, options), first, count)
        if self._mesh is not None:
            sharding.check_batch(count, self._mesh)
            placement = sharding.batch_sharding(self._mesh)
            condition, indices, known = jax.device_put((condition, indices, known), placement)
        return self._params, condition, indices, key, options.scalars(), known

    def _checked_frames(self, frames):
        return checked_integers("frames", frames, (self.config.num_tokens,), 0, self.config.codebook_size)


class LoadedFlow(LoadedGenerator):
    """A flow generator with its weights. It samples latents [B, N, d] float32, as a tokenizer decodes them.

    A sampling program is compiled for each batch size and `solver`, and with or without guidance. Scales and
    `solver_steps` can change without another compilation. Given frames are latents of `LoadedTokenizer.encode_frames`.

    Args:
      config: configuration of the generator.
      params: its parameters (`TrainState.params["generator"]`).
      statistics: mean and standard deviation of each channel of the latents that it was trained on, [d] each.
      **options: as for `LoadedGenerator`.
    """

    network = Flow
    config: FlowConfig  # type: ignore[assignment]

    def __init__(
        self, config: FlowConfig, params: Mapping, *, statistics: tuple[np.ndarray, np.ndarray] | None, **options: Any
    ):
        if statistics is None or any(np.shape(x) != (config.code_dim,) for x in statistics):
            raise InputError("the checkpoint has no statistics of the latents of this flow generator; use another step")
        super().__init__(config, params, **options)  # type: ignore[arg-type]
        mean, std = self.statistics = tuple(np.asarray(x, np.float32) for x in statistics)

        def sample(params, condition, indices, key, scalars, known, plan):
            found = sample_latents(self.module(params), condition, indices, key, scalars, plan)
            return found._replace(latents=found.latents * std + mean)

        self._sample = jax.jit(sample, static_argnames="plan")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights at this precision, 16 hexadecimal digits."""
        return digest(f"generator {self.precision}", {"params": self._params, "statistics": self.statistics})

    def logits(self, *arguments: Any, **options: Any) -> jax.Array:
        """Raises `InputError`: there are none, see `larp_jax.models.flow.Flow` for velocities."""
        raise InputError("this generator samples continuous latents and has no logits; give one of codes")

    def _check_sizes(self, tokenizer: TokenizerConfig) -> None:
        found = (
            f"{tokenizer.num_tokens} codes"
            if tokenizer.quantizer.has_codes
            else f"{tokenizer.num_tokens} latents of {tokenizer.quantizer.code_dim} channels"
        )
        ours = f"{self.config.num_tokens} latents of {self.config.code_dim} channels"
        if tokenizer.adaptive or ours != found:
            raise InputError(
                f"the generator samples {ours}, the tokenizer has {found}; give the tokenizer that the generator was"
                " trained with"
            )

    def standardized(self, latents: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """Latents [..., d] as the network has them: each channel with mean 0 and standard deviation 1 in training."""
        mean, std = self.statistics
        return (latents - mean) / std

    def _checked_frames(self, frames):
        return self.standardized(checked_latents(frames, self.config.token_shape))


def _is_auto(budget: Budget) -> bool:
    return isinstance(budget, str) and budget == AUTO


def checked_params(module: nnx.Module, params: Mapping, kind: str) -> dict:
    """The parameters as float32 NumPy arrays; `InputError` if their names or shapes do not match the module."""

    def by_name(tree):
        return {path_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}

    expected = by_name(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    compare_shapes(expected, by_name(dict(params)), f"the settings of the {kind}")
    return jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params))
