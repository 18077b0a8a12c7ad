"""Settings of the networks and the tables of their sizes. The defaults are the published model (LARP-L-Long)."""

import dataclasses
import functools
import math

from larp_jax.config.checks import at_least_0, check_positions, one_of, require, within
from larp_jax.config.clips import Clips
from larp_jax.config.condition import Conditional
from larp_jax.config.ladder import Ladder

NUMBERS = ("width", "depth", "heads")

# The `NUMBERS` of each size. `larp_l` is the published LARP-L-Long: 172.18 M parameters with 1024 tokens and
# 8,192 codes. `vitok_*` are the sizes of ViTok (arXiv 2501.09755, table 1), with its `block`.
TOKENIZER_SIZES = {
    "larp_s": (384, 12, 6),
    "larp_b": (768, 6, 12),
    "larp_l": (768, 12, 12),
    "vitok_s": (768, 6, 12),
    "vitok_b": (768, 12, 12),
    "vitok_l": (1152, 24, 16),
}
PRIOR_SIZES = {
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "M": (512, 12, 8),
    "S": (384, 12, 6),
    "XS": (384, 6, 6),
    "XXS": (256, 6, 4),
}
# `LP` is the published generator of 632 M parameters.
GENERATOR_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "LP": (1280, 30, 20),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "XXXL": (2560, 48, 40),
}


def from_size(name: str, size: str, table: dict, width: int, depth: int, heads: int) -> tuple[int, int, int]:
    """Width, depth and heads: each as given, or if 0 from the table. If all are given, the size may be any text."""
    if width and depth and heads:
        return width, depth, heads
    one_of(name, size, table)
    width, depth, heads = (given or named for given, named in zip((width, depth, heads), table[size], strict=True))
    return width, depth, heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Width, depth and heads of a transformer. 0 means the number that belongs to the `size` of the model."""

    width: int = 0
    depth: int = 0
    heads: int = 0

    def check(self, name: str) -> None:
        """`InputError` if a number is not positive or the width is not divisible as required; `name` is the section."""
        for field in NUMBERS:
            require(getattr(self, field) > 0, f"{name}.{field} must be positive, got {getattr(self, field)}")
        heads = f"{name}.heads={self.heads}"
        require(self.width % self.heads == 0, f"{name}.width={self.width} is not divisible by {heads}")
        require(self.width % 4 == 0, f"{name}.width={self.width} is not divisible by 4, as position tables need")


def swiglu_width(width: int) -> int:
    """Hidden width of a SwiGLU MLP that has as many parameters as a plain one with four times the width."""
    return 8 * width // 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The quantizer (LARP, arXiv 2410.21264, section 3.2).

    `kind` is `svq` (stochastic: samples codes in training), `vq` (always the nearest code) or `kl` (continuous Gaussian
    latents, `skl` in the released code). `temperature` is the sampling temperature of `svq`. If `temperature_start` is
    above 0, the temperature changes linearly from it to `temperature` over the first part of training, a fraction
    `temperature_ramp` of all steps.

    `input_norm` is `none`, or `layer` for a layer norm before the input projection of the quantizer. `norm` is `none`,
    or a layer norm after that projection under the name in the released code: `ln_d` (over d, the dimension of codes)
    or `ln_nd` (over tokens and d together). `l2_normalized` scales latents and codes to unit length; `svq` needs it.

    The entropy loss is computed from softmax(-D / `entropy_temperature`), where D are the squared distances between
    latents and codes.
    """

    kind: str = "svq"
    codebook_size: int = 8192
    code_dim: int = 16
    temperature: float = 0.03
    temperature_start: float = 0.0
    temperature_ramp: float = 0.0
    commitment_weight: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    kl_weight: float = 1e-6
    input_norm: str = "none"
    norm: str = "none"
    l2_normalized: bool = True

    def __post_init__(self):
        one_of("quantizer.kind", self.kind, ("svq", "vq", "kl"))
        one_of("quantizer.input_norm", self.input_norm, ("none", "layer"))
        one_of("quantizer.norm", self.norm, ("none", "ln_d", "ln_nd"))
        require(
            self.l2_normalized or self.kind != "svq",
            "quantizer.kind='svq' needs quantizer.l2_normalized=True; set it, or set quantizer.kind='vq'",
        )
        require(self.codebook_size > 1, f"quantizer.codebook_size must be above 1, got {self.codebook_size}")
        require(self.code_dim > 0, f"quantizer.code_dim must be positive, got {self.code_dim}")
        for name in ("temperature", "entropy_temperature"):
            require(getattr(self, name) > 0, f"quantizer.{name} must be positive, got {getattr(self, name)}")
        weights = ("commitment_weight", "codebook_weight", "entropy_weight", "kl_weight")
        at_least_0("quantizer", self, "temperature_start", *weights)
        within("quantizer", self, "temperature_ramp")

    @property
    def has_codes(self) -> bool:
        """Whether latents are quantized to codes; `kl` has continuous latents and no codebook."""
        return self.kind != "kl"

    @property
    def codes(self) -> int:
        """K, the number of different codes; 0 if there are none."""
        return self.codebook_size if self.has_codes else 0

    @property
    def tokens(self) -> str:
        """What a clip is encoded to, by the name of its array: `codes` or `latents`."""
        return "codes" if self.has_codes else "latents"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Clips):
    """The tokenizer (LARP, arXiv 2410.21264, section 3.2).

    Clips are squares of `resolution`, or if `shape` is given, of this height and width, such as 72,128; `resolution` is
    then the shorter side.

    `layout` is `holistic`: queries collect what the codes encode (LARP); or `patchwise`: each patch has its own code,
    as in earlier tokenizers, and `num_tokens` is the number of patches.

    With a `ladder`, the frames are `blocks` equal parts, each with as many codes as it needs: one of the numbers of the
    ladder. Codes of a block depend on its frames and those before, and so do its reconstructed frames (EVATok, arXiv
    2603.12267). `num_tokens` is then the bucket, the most codes of a clip.

    `size` selects width, depth and heads; `encoder` and `decoder` can override each of them. A size given on the
    command line replaces these numbers of the recipe.

    `block` is that of both transformers: `larp`, or `vitok` with SwiGLU, RMS norms and rotary positions (ViTok, arXiv
    2501.09755). Patches are then rotated by their place in the clip and have no fixed table, only a learned one if
    asked for; queries and latents have their tables and are not rotated, as if they were at the clip's origin.

    If `decoder_patch_frames` or `decoder_patch_size` is 0, the decoder uses the number of the encoder. Each of the four
    position or query tables can be learned instead of fixed sine-cosine (`learned_*`), and can have a learned
    token-type vector that is added to all rows (`use_*`); the names are those of the released configuration. Learned
    encoder queries are initialized from a normal distribution with standard deviation `query_init_std`, or as a
    sine-cosine table if `encoder_query_gaussian_init` is false. `latent_position_base` is the base of the frequencies
    of fixed tables for queries and latents.
    """

    size: str = "larp_l"
    layout: str = "holistic"
    block: str = "larp"
    frames: int = 16
    resolution: int = 128
    shape: tuple[int, ...] = ()
    channels: int = 3
    patch_frames: int = 4
    patch_size: int = 8
    decoder_patch_frames: int = 0
    decoder_patch_size: int = 0
    num_tokens: int = 1024
    blocks: int = 1
    ladder: tuple[int, ...] = ()
    encoder: TransformerConfig = TransformerConfig()
    decoder: TransformerConfig = TransformerConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    learned_encoder_patch_pe: bool = False
    learned_encoder_latent_query_embed: bool = True
    learned_decoder_latent_pe: bool = False
    learned_decoder_patch_query_embed: bool = False
    use_encoder_patch_token_type_embed: bool = False
    use_encoder_latent_query_token_type_embed: bool = False
    use_decoder_latent_token_type_embed: bool = False
    use_decoder_patch_query_token_type_embed: bool = True
    encoder_query_gaussian_init: bool = True
    query_init_std: float = 0.02
    latent_position_base: float = 10000.0

    def __post_init__(self):
        set_field = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in ("encoder", "decoder"):
            part = getattr(self, name)
            width, depth, heads = from_size(
                "model.size", self.size, TOKENIZER_SIZES, part.width, part.depth, part.heads
            )
            set_field(name, TransformerConfig(width=width, depth=depth, heads=heads))
            getattr(self, name).check(f"model.{name}")
        at_least_0("model", self, "decoder_patch_frames", "decoder_patch_size", "query_init_std")
        base = self.latent_position_base
        require(base > 0, f"model.latent_position_base must be positive, got {base}")
        set_field("decoder_patch_frames", self.decoder_patch_frames or self.patch_frames)
        set_field("decoder_patch_size", self.decoder_patch_size or self.patch_size)
        self._settle_shape()
        for name in ("frames", "resolution", "channels", "patch_frames", "patch_size", "num_tokens"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        require(self.channels == 3, f"model.channels={self.channels} is not supported: videos are RGB; set it to 3")
        self._check_patch("patch_frames", "patch_size")
        self._check_patch("decoder_patch_frames", "decoder_patch_size")
        one_of("model.layout", self.layout, ("holistic", "patchwise"))
        one_of("model.block", self.block, ("larp", "vitok"))
        for name in ("encoder", "decoder") if self.is_rotary else ():
            width = getattr(self, name).width // getattr(self, name).heads
            require(
                width % 2 == 0 and width >= 6,
                f"model.block='vitok' needs heads of even width and at least 6; that of model.{name} is {width}",
            )
        for grid in (self.encoder_grid, self.decoder_grid):
            check_positions(math.prod(grid) + self.num_tokens, "the patches of model.frames, model.resolution")
            require(
                not self.is_patchwise or math.prod(grid) == self.num_tokens,
                f"model.layout='patchwise' needs one code per patch; set model.num_tokens={math.prod(grid)}",
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        """`InputError` unless blocks and ladder fit the other settings."""
        require(
            bool(self.ladder) or self.blocks == 1,
            f"model.blocks={self.blocks} needs model.ladder, the numbers of codes that a block may have",
        )
        if not self.adaptive:
            return
        self.adaptive.check()
        for name in ("patch_frames", "decoder_patch_frames"):
            frames = self.blocks * getattr(self, name)
            require(
                self.frames % frames == 0,
                f"model.frames={self.frames} do not split into model.blocks={self.blocks} of whole patches of"
                f" model.{name}={getattr(self, name)}; change one of them",
            )
        require(not self.is_patchwise, "model.layout='patchwise' has one code per patch; leave out model.ladder")
        require(
            self.quantizer.norm != "ln_nd",
            "model.quantizer.norm='ln_nd' needs the same number of codes in all clips; leave out model.ladder",
        )

    @functools.cached_property
    def adaptive(self) -> Ladder | None:
        """The numbers of codes that the blocks of a clip may have; None if every clip has `num_tokens`."""
        return Ladder(self.ladder, self.blocks, self.num_tokens) if self.ladder else None

    @property
    def query_rows(self) -> int:
        """Number of queries of a block: `num_tokens`, or the largest number of the ladder."""
        return self.ladder[-1] if self.ladder else self.num_tokens

    @property
    def is_patchwise(self) -> bool:
        """Whether each code belongs to a patch, instead of to the whole clip."""
        return self.layout == "patchwise"

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of what a clip is encoded to: [N] codes, or [N, d] latents."""
        q = self.quantizer
        return (self.num_tokens,) if q.has_codes else (self.num_tokens, q.code_dim)

    @property
    def size_of_clip(self) -> dict[str, float]:
        """How much a clip is encoded to: its `bits`, log2(K) of each code, or its `floats`, E = N d of ViTok.

        With a ladder, these are the most bits.
        """
        if self.quantizer.has_codes:
            return {"bits": self.num_tokens * math.log2(self.quantizer.codebook_size)}
        return {"floats": math.prod(self.token_shape)}

    @property
    def encoded_as(self) -> str:
        """What a clip is encoded to, as text: `1,024 codes of 13 bits, 13,312 bits in all`."""
        ((unit, total),) = self.size_of_clip.items()
        most = "at most " if self.ladder else ""
        each = f"{self.num_tokens:,} {self.quantizer.tokens} of {total / self.num_tokens:g} {unit}"
        return f"{most}{each}, {round(total):,} {unit} in all"

    @property
    def is_rotary(self) -> bool:
        """Whether patches have rotary positions, in place of fixed tables."""
        return self.block == "vitok"

    @property
    def tokens_beside_patches(self) -> int:
        """Number of queries or latents that both transformers attend to besides the patches."""
        return 0 if self.is_patchwise else self.num_tokens

    @property
    def encoder_patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width) of the encoder."""
        return self.patch_frames, self.patch_size, self.patch_size

    @property
    def decoder_patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width) of the decoder."""
        return self.decoder_patch_frames, self.decoder_patch_size, self.decoder_patch_size

    @property
    def clip_unit(self) -> tuple[int, int, int]:
        """(time, height, width) whose multiples divide into the patches of encoder and decoder."""
        t, h, w = map(math.lcm, self.encoder_patch, self.decoder_patch)
        return t, h, w

    @property
    def encoder_grid(self) -> tuple[int, int, int]:
        """Number of patches (time, height, width) in the encoder."""
        return self._grid(self.encoder_patch)

    @property
    def decoder_grid(self) -> tuple[int, int, int]:
        """Number of patches (time, height, width) in the decoder."""
        return self._grid(self.decoder_patch)


# Settings of TokenizerConfig that affect only initialization and training: tokenizers that differ in no other setting
# compute the same codes and videos from the same weights.
TRAINING_FIELDS = frozenset(
    {
        "query_init_std",
        "encoder_query_gaussian_init",
        "quantizer.temperature",
        "quantizer.temperature_start",
        "quantizer.temperature_ramp",
        "quantizer.commitment_weight",
        "quantizer.codebook_weight",
        "quantizer.entropy_weight",
        "quantizer.entropy_temperature",
        "quantizer.kl_weight",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The autoregressive prior that is trained together with the tokenizer (LARP, arXiv 2410.21264, section 3.3).

    `size` selects width, depth and heads; each can be overridden. `rounds` is the number of passes of scheduled
    sampling; from the second on, inputs are replaced at random by codes sampled in the pass before. Their share rises
    linearly from 0 to `mix_max` over the first part of training, a fraction `mix_ramp` of all steps. `temperature`
    divides the cosines between predicted and actual codes.

    `objective` is `code`, the published cross-entropy of the next code; or `latent`, the mean squared error of the next
    latent before quantization, without scheduled sampling (arXiv 2412.16326). If `detached`, no gradient of the
    objective reaches the tokenizer: the prior learns, but does not shape the codes.

    `positions` is the number of rows of the position table; 0 means the number of tokens. (Released priors have 1024
    rows even if the tokenizer has fewer tokens.)
    """

    size: str = "S"
    width: int = 0
    depth: int = 0
    heads: int = 0
    positions: int = 0
    dropout: float = 0.1
    temperature: float = 1.0
    rounds: int = 2
    mix_max: float = 0.5
    mix_ramp: float = 0.3
    objective: str = "code"
    detached: bool = False

    def __post_init__(self):
        numbers = from_size("prior.size", self.size, PRIOR_SIZES, self.width, self.depth, self.heads)
        for name, value in zip(NUMBERS, numbers, strict=True):
            object.__setattr__(self, name, value)
        TransformerConfig(width=self.width, depth=self.depth, heads=self.heads).check("prior")
        one_of("prior.objective", self.objective, ("code", "latent"))
        require(self.rounds >= 1, f"prior.rounds must be at least 1, got {self.rounds}")
        require(0 <= self.dropout < 1, f"prior.dropout must be in [0, 1), got {self.dropout}")
        require(self.temperature > 0, f"prior.temperature must be positive, got {self.temperature}")
        at_least_0("prior", self, "positions")
        within("prior", self, "mix_max", "mix_ramp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorConfig(Conditional):
    """The generator of stage 2 (LARP, arXiv 2410.21264, section 4.1).

    `size` selects width, depth and heads; each can be overridden. If `kv_heads` is 0, there are as many key/value heads
    as query heads. The hidden width of the MLP is 8/3 of the width, times `mlp_multiplier` if that is not 0, rounded up
    to a multiple of `mlp_multiple`.

    `condition` is what the generator is given: `class`, `frames` (the codes of the given frames followed by a
    separator), `class+frames` or `none`. If it is empty, `frame_prediction` decides between `frames` and `class`, the
    two published forms. `class_dropout` is the probability that the null class replaces the class in training; without
    it (0), there is no null class and no classifier-free guidance. `frames_dropout` is the probability that the given
    frames are left out: separators replace their codes. Both are drawn independently. `path_dropout` is the rate of
    stochastic depth in the last block. If `codebook_size`, `num_tokens` or `num_classes` is 0, training sets it to the
    number of the tokenizer or the data.

    With a `ladder` the clips have different numbers of codes: each of `blocks` blocks of frames has one of the numbers
    of the ladder, and the generator writes it before their codes (arXiv 2603.12267). `num_tokens` is then the bucket,
    the most codes of a clip. Training takes both from the codes.
    """

    size: str = "LP"
    width: int = 0
    depth: int = 0
    heads: int = 0
    kv_heads: int = 0
    codebook_size: int = 8192
    num_tokens: int = 1024
    blocks: int = 1
    ladder: tuple[int, ...] = ()
    frame_prediction: bool = False
    condition: str = ""
    num_classes: int = 101
    class_dropout: float = 0.1
    frames_dropout: float = 0.0
    token_dropout: float = 0.1
    attention_dropout: float = 0.0
    residual_dropout: float = 0.1
    mlp_dropout: float = 0.1
    path_dropout: float = 0.0
    mlp_multiplier: float = 0.0
    mlp_multiple: int = 256
    norm_epsilon: float = 1e-5
    fixed_positions: bool = False
    init_std: float = 0.02

    def __post_init__(self):
        numbers = from_size("model.size", self.size, GENERATOR_SIZES, self.width, self.depth, self.heads)
        for name, value in zip(NUMBERS, numbers, strict=True):
            object.__setattr__(self, name, value)
        TransformerConfig(width=self.width, depth=self.depth, heads=self.heads).check("model")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        one_of("model.condition", self.given, ("class", "frames", "class+frames", "none"))
        require(
            self.has_frames or not self.frame_prediction,
            f"model.condition={self.condition!r} gives no frames, but model.frame_prediction is True; set it to False",
        )
        if self.condition in ("class", "frames"):  # one form for each, that of the published settings
            object.__setattr__(self, "frame_prediction", self.has_frames)
            object.__setattr__(self, "condition", "")
        for name in ("kv_heads", "mlp_multiple"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        for name in ("codebook_size", "num_tokens", "num_classes"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        check_positions(self.condition_tokens + self.symbols, "the condition")
        if self.ladder and self.num_tokens:
            self.adaptive.check()
        require(
            bool(self.ladder) or self.blocks == 1, f"model.blocks={self.blocks} needs model.ladder; set it to 1"
        )
        require(
            not (self.ladder and self.has_frames),
            f"model.condition={self.given!r} is for clips of one length; with a model.ladder set it to 'class' or"
            " 'none': given frames are then the first blocks of the sequence",
        )
        require(self.heads % self.kv_heads == 0, f"model.kv_heads={self.kv_heads} does not divide heads={self.heads}")
        require(self.codebook_size != 1, "model.codebook_size must be above 1, got 1")
        require(self.norm_epsilon > 0, f"model.norm_epsilon must be positive, got {self.norm_epsilon}")
        at_least_0("model", self, "mlp_multiplier", "init_std")
        for part in ("class", "frames", "token", "attention", "residual", "mlp", "path"):
            rate = getattr(self, f"{part}_dropout")
            require(0 <= rate < 1, f"model.{part}_dropout must be in [0, 1), got {rate}")

    def check_complete(self) -> None:
        """`InputError` if a size is 0, which only training from a tokenizer and data fills in."""
        for name in ("codebook_size", "num_tokens", "num_classes"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got 0; give a number")

    @property
    def given(self) -> str:
        """The condition by its name: `class`, `frames`, `class+frames` or `none`."""
        return self.condition or ("frames" if self.frame_prediction else "class")

    @property
    def has_codes(self) -> bool:
        """True: it samples codes."""
        return True

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of the codes of a clip."""
        return (self.num_tokens,)

    @property
    def adaptive(self) -> Ladder | None:
        """The numbers of codes that a clip may have; None if it is always `num_tokens`."""
        return Ladder(self.ladder, self.blocks, self.num_tokens) if self.ladder else None

    @property
    def vocabulary(self) -> int:
        """Number of symbols of a sequence: the codes and, with a ladder, its lengths behind them."""
        return self.codebook_size + len(self.ladder)

    @property
    def symbols(self) -> int:
        """The most symbols of a sequence: the codes and, with a ladder, the length of each block."""
        return self.num_tokens + (self.blocks if self.ladder else 0)

    @property
    def condition_tokens(self) -> int:
        """Number of positions before the first token: one for the class, and the given codes plus one."""
        return (self.class_rows > 0) + (self.num_tokens + 1 if self.has_frames else 0)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the SwiGLU MLP (LARP, section 4.1)."""
        hidden = swiglu_width(self.width)
        if self.mlp_multiplier:
            hidden = int(self.mlp_multiplier * hidden)
        return -(-hidden // self.mlp_multiple) * self.mlp_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(TransformerConfig):
    """The discriminator: by default, the published transformer over whole clips.

    `kind` is `transformer`, which reads pixels, or `frozen` (EVATok, arXiv 2603.12267), which reads the features of a
    frozen network, `trunk`: the name or path of a teacher. One head of 1-D convolutions, of `width` channels, is then
    trained on each of `layers` of the trunk, counted from 1; depth, heads and patch have no effect.
    """

    kind: str = "transformer"
    trunk: str = "videomae_b"
    layers: tuple[int, ...] = (3, 6, 9, 12)
    width: int = 512
    depth: int = 12
    heads: int = 8
    patch_frames: int = 4
    patch_size: int = 8

    def __post_init__(self):
        one_of("discriminator.kind", self.kind, ("transformer", "frozen"))
        require(self.trunk, "discriminator.trunk must be the name or path of a teacher, got ''")
        increasing = list(self.layers) == sorted(set(self.layers))
        require(
            bool(self.layers) and self.layers[0] > 0 and increasing,
            f"discriminator.layers={self.layers} must be increasing numbers from 1; give one at least",
        )
        self.check("discriminator")
        for name in ("patch_frames", "patch_size"):
            require(getattr(self, name) > 0, f"discriminator.{name} must be positive, got {getattr(self, name)}")

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width)."""
        return self.patch_frames, self.patch_size, self.patch_size
