"""Every setting there is: frozen dataclasses, the tables of sizes, and the way from a recipe to them.

A recipe (a file in `configs/`) is an `ml_collections.ConfigDict` made by `default_recipe` and changed; `parse_recipe`
turns it into the frozen dataclasses that the code uses and refuses what does not fit, in one line.
The defaults are the published recipe (LARP-L-Long).
"""

import dataclasses
import difflib
import logging
import math
import typing

from larp_jax.errors import InputError

logger = logging.getLogger(__name__)

# width, depth, heads. `larp_l` is the published LARP-L-Long: 172.18 M parameters at 1024 tokens and 8,192 codes.
TOKENIZER_SIZES = {
    "larp_s": (384, 12, 6),
    "larp_b": (768, 6, 12),
    "larp_l": (768, 12, 12),
}
PRIOR_SIZES = {
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "M": (512, 12, 8),
    "S": (384, 12, 6),
    "XS": (384, 6, 6),
    "XXS": (256, 6, 4),
}
# `LP` is the published 632 M generator.
GENERATOR_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "LP": (1280, 30, 20),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "XXXL": (2560, 48, 40),
}

# What a size fills: by stage and section its table, and the parts whose width, depth and heads are left at 0.
NUMBERS = ("width", "depth", "heads")
SIZED: dict[str, dict[str, tuple[dict, tuple[str, ...]]]] = {
    "tokenizer": {"model": (TOKENIZER_SIZES, ("model.encoder", "model.decoder")), "prior": (PRIOR_SIZES, ("prior",))},
    "generator": {"model": (GENERATOR_SIZES, ("model",))},
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _one_of(name: str, value: str, allowed: typing.Iterable[str]) -> None:
    _require(
        isinstance(value, str) and value in allowed,
        f"{name}={value!r} is not known; choose one of {', '.join(allowed)}",
    )


def _from_size(name: str, size: str, table: dict, width: int, depth: int, heads: int) -> tuple[int, int, int]:
    """The size's numbers, each replaced where one is given (not 0); where all are, the size is a label: any will do."""
    if width and depth and heads:
        return width, depth, heads
    _one_of(name, size, table)
    width, depth, heads = (given or named for given, named in zip((width, depth, heads), table[size], strict=True))
    return width, depth, heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size of a stack; 0 takes the number of the model's `size`."""

    width: int = 0
    depth: int = 0
    heads: int = 0

    def check(self, name: str) -> None:
        """`InputError`, naming the setting as below `name`, where the numbers do not fit each other."""
        for field in NUMBERS:
            _require(getattr(self, field) > 0, f"{name}.{field} must be positive, got {getattr(self, field)}")
        _require(self.width % self.heads == 0, f"{name}.width={self.width} is not divisible by {self.heads} heads")
        _require(self.width % 4 == 0, f"{name}.width={self.width} is not divisible by 4, as position tables need")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """The bottleneck (METHOD 1).

    `kind`: `svq` (stochastic draw in training), `vq` (always the nearest code), `kl` (continuous Gaussian latents).
    `temperature_start` above 0 anneals the draw's temperature linearly from it to `temperature` over the first
    `temperature_ramp` of training. `input_norm`: `none` or `layer`, a layer norm before in_linear.
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

    def __post_init__(self):
        _one_of("quantizer.kind", self.kind, ("svq", "vq", "kl"))
        _one_of("quantizer.input_norm", self.input_norm, ("none", "layer"))
        _require(self.codebook_size > 1, f"quantizer.codebook_size must be above 1, got {self.codebook_size}")
        _require(self.code_dim > 0, f"quantizer.code_dim must be positive, got {self.code_dim}")
        _require(self.temperature > 0, f"quantizer.temperature must be positive, got {self.temperature}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer. `size` names width, depth and heads; `encoder` and `decoder` may override them one by one.

    On the command line a size brings its numbers, whatever the recipe sets (see `take_sizes`).
    `decoder_patch_frames` and `decoder_patch_size` of 0 take the encoder's patch. Each of the four embedding tables
    may be learned instead of fixed sine-cosine (`learned_*`) and carry a learned vector on every row (`use_*`), under
    the names of the released configuration. Learned queries start Gaussian with `query_init_std`, or sine-cosine.
    """

    size: str = "larp_l"
    frames: int = 16
    resolution: int = 128
    channels: int = 3
    patch_frames: int = 4
    patch_size: int = 8
    decoder_patch_frames: int = 0
    decoder_patch_size: int = 0
    num_tokens: int = 1024
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
            width, depth, heads = _from_size(
                "model.size", self.size, TOKENIZER_SIZES, part.width, part.depth, part.heads
            )
            set_field(name, TransformerConfig(width=width, depth=depth, heads=heads))
            getattr(self, name).check(f"model.{name}")
        set_field("decoder_patch_frames", self.decoder_patch_frames or self.patch_frames)
        set_field("decoder_patch_size", self.decoder_patch_size or self.patch_size)
        for name in ("frames", "resolution", "channels", "patch_frames", "patch_size", "num_tokens"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        for whole, part in (
            ("frames", "patch_frames"),
            ("resolution", "patch_size"),
            ("frames", "decoder_patch_frames"),
            ("resolution", "decoder_patch_size"),
        ):
            size, patch = getattr(self, whole), getattr(self, part)
            _require(
                size % patch == 0,
                f"model.{whole}={size} is not divisible by model.{part}={patch}; change one of them",
            )

    @property
    def encoder_patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width) of the encoder."""
        return self.patch_frames, self.patch_size, self.patch_size

    @property
    def decoder_patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width) of the decoder."""
        return self.decoder_patch_frames, self.decoder_patch_size, self.decoder_patch_size

    @property
    def encoder_grid(self) -> tuple[int, int, int]:
        """Patches along time, height, width in the encoder."""
        return self._grid(self.encoder_patch)

    @property
    def decoder_grid(self) -> tuple[int, int, int]:
        """Patches along time, height, width in the decoder."""
        return self._grid(self.decoder_patch)

    def _grid(self, patch):
        pt, ph, pw = patch
        return self.frames // pt, self.resolution // ph, self.resolution // pw

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """[T, H, W, C] of a clip."""
        return self.frames, self.resolution, self.resolution, self.channels


# Settings of TokenizerConfig that only say how training starts and runs: tokenizers that differ in nothing else compute
# the same codes and videos from the same weights.
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
    """The AR prior (METHOD 2). Scheduled sampling rises to `mix_max` over the first `mix_ramp` of training.

    `positions` are the rows of the position table, as many as tokens where 0 (released priors keep 1024 for fewer).
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

    def __post_init__(self):
        numbers = _from_size("prior.size", self.size, PRIOR_SIZES, self.width, self.depth, self.heads)
        for name, value in zip(NUMBERS, numbers, strict=True):
            object.__setattr__(self, name, value)
        TransformerConfig(width=self.width, depth=self.depth, heads=self.heads).check("prior")
        _require(self.rounds >= 1, f"prior.rounds must be at least 1, got {self.rounds}")
        _require(0 <= self.dropout < 1, f"prior.dropout must lie in [0, 1), got {self.dropout}")
        _require(0 <= self.mix_max <= 1, f"prior.mix_max must lie in [0, 1], got {self.mix_max}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The stage-2 generator (METHOD 4). `size` names width, depth and heads, which may be overridden one by one.

    `kv_heads` of 0 takes as many key/value heads as query heads; `mlp_multiplier` of 0 leaves the hidden width alone.
    With `frame_prediction` the condition is the codes of the frames before and a separator, otherwise a class.
    `class_dropout` of 0 leaves out the null class, and with it guidance. Before training, `codebook_size`,
    `num_tokens` and `num_classes` of 0 are those of the tokenizer and the data.
    """

    size: str = "LP"
    width: int = 0
    depth: int = 0
    heads: int = 0
    kv_heads: int = 0
    codebook_size: int = 8192
    num_tokens: int = 1024
    frame_prediction: bool = False
    num_classes: int = 101
    class_dropout: float = 0.1
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
        numbers = _from_size("model.size", self.size, GENERATOR_SIZES, self.width, self.depth, self.heads)
        for name, value in zip(NUMBERS, numbers, strict=True):
            object.__setattr__(self, name, value)
        TransformerConfig(width=self.width, depth=self.depth, heads=self.heads).check("model")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        for name in ("kv_heads", "mlp_multiple"):
            _require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        for name in ("codebook_size", "num_tokens", "num_classes"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        _require(self.heads % self.kv_heads == 0, f"model.kv_heads={self.kv_heads} does not divide heads={self.heads}")
        _require(self.codebook_size != 1, "model.codebook_size must be above 1, got 1")
        _require(self.norm_epsilon > 0, f"model.norm_epsilon must be positive, got {self.norm_epsilon}")
        _require(self.mlp_multiplier >= 0, f"model.mlp_multiplier must not be negative, got {self.mlp_multiplier}")
        for part in ("class", "token", "attention", "residual", "mlp", "path"):
            rate = getattr(self, f"{part}_dropout")
            _require(0 <= rate < 1, f"model.{part}_dropout must lie in [0, 1), got {rate}")

    def check_complete(self) -> None:
        """`InputError` where a size is left open, which only training from a tokenizer and data fills in."""
        for name in ("codebook_size", "num_tokens", "num_classes"):
            _require(getattr(self, name) > 0, f"model.{name}=0 leaves it open; give a number")

    @property
    def condition_tokens(self) -> int:
        """Positions before the first token: the class, or the condition's codes and the separator."""
        return self.num_tokens + 1 if self.frame_prediction else 1

    @property
    def mlp_width(self) -> int:
        """Hidden width of the SwiGLU (METHOD 4)."""
        hidden = int(2 * 4 * self.width / 3)
        if self.mlp_multiplier:
            hidden = int(self.mlp_multiplier * hidden)
        return -(-hidden // self.mlp_multiple) * self.mlp_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(TransformerConfig):
    """The transformer that judges whole clips (METHOD 3), the published size by default."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    patch_frames: int = 4
    patch_size: int = 8

    def __post_init__(self):
        self.check("discriminator")
        for name in ("patch_frames", "patch_size"):
            _require(getattr(self, name) > 0, f"discriminator.{name} must be positive, got {getattr(self, name)}")

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width)."""
        return self.patch_frames, self.patch_size, self.patch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objective (METHOD 3). `prior_weight` 0 trains without a prior.

    `adversarial_weight` 0 trains without a discriminator. Otherwise `adversarial` names the losses of both sides, from
    step `adversarial_start` on the tokenizer hears the discriminator, and on every multiple of `discriminator_every`
    from there the discriminator learns. `lecam_weight` acts squared, as in the released code.
    `perceptual` is `none`, `lpips` for the weights where `larp-jax doctor` looks for them, or the path of that file;
    `perceptual_frames` above 0 compares so many frames a step, drawn anew, instead of all.
    """

    reconstruction: str = "l1"
    quantizer_weight: float = 0.1
    prior_weight: float = 0.06
    perceptual: str = "lpips"
    perceptual_weight: float = 1.0
    perceptual_frames: int = 0
    adversarial: str = "ns_smooth"
    adversarial_weight: float = 0.3
    adversarial_start: int = 0
    discriminator_every: int = 5
    lecam_weight: float = 0.001
    r1_weight: float = 0.0

    def __post_init__(self):
        _one_of("loss.reconstruction", self.reconstruction, ("l1", "l2"))
        _one_of("loss.adversarial", self.adversarial, ("ns", "ns_smooth", "hinge"))
        _require(self.perceptual, "loss.perceptual must be 'none', 'lpips' or the path of its weights, got nothing")
        _require(self.discriminator_every > 0, f"loss.discriminator_every={self.discriminator_every} must be positive")
        for name in ("adversarial_weight", "adversarial_start", "lecam_weight", "r1_weight", "perceptual_frames"):
            _require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam with linear warm-up and cosine decay per step (METHOD 3 and 4).

    The rate starts at `floor` times itself, reaches its full value after `warmup_steps` and ends at `floor` times it.
    `clip_norm` 0 leaves gradients alone; `ema_decay` 0 keeps no average.
    """

    learning_rate: float = 1e-4
    b1: float = 0.5
    b2: float = 0.9
    warmup_steps: int = 0
    floor: float = 0.01
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optim.learning_rate must be positive, got {self.learning_rate}")
        _require(0 <= self.ema_decay < 1, f"optim.ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamConfig):
    """Of a tokenizer.

    `multipliers` scale the rate of the parameters below a path (`prior`, `tokenizer/encoder`): the longest that
    matches counts; 0 freezes. The paper names 50 for the prior; the released trainer overwrites it with 1 before each
    step. The discriminator has an Adam of its own that differs in nothing but the rate.
    """

    discriminator_learning_rate: float = 3e-5
    multipliers: dict = dataclasses.field(default_factory=lambda: {"prior": 1.0})

    def __post_init__(self):
        super().__post_init__()
        rate = self.discriminator_learning_rate
        _require(rate > 0, f"optim.discriminator_learning_rate must be positive, got {rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorOptimConfig(AdamConfig):
    """Of a generator: AdamW. `weight_decay` is for the kernels of linear layers only."""

    learning_rate: float = 6e-4
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        _require(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from. `batch_size` counts clips over all hosts; `workers` 0 reads in threads.

    `flip` mirrors half of the training clips, drawn at random. The released configuration asks for it, but the released
    data set never does it.
    """

    train: str = ""
    eval: str = ""
    batch_size: int = 128
    eval_clips: int = 256
    workers: int = 0
    flip: bool = False

    def __post_init__(self):
        _require(self.batch_size > 0, f"data.batch_size must be positive, got {self.batch_size}")
        _require(self.workers >= 0, f"data.workers must not be negative, got {self.workers}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.model)
        _require(sizes.count(-1) <= 1, f"mesh={sizes}: only one axis may be -1")
        _require(all(n > 0 or n == -1 for n in sizes), f"mesh={sizes}: sizes must be positive, or -1 for the rest")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The mesh's (data, fsdp, model) over a number of devices."""
        rest = devices // max(1, -math.prod((self.data, self.fsdp, self.model)))
        data, fsdp, model = (rest if size == -1 else size for size in (self.data, self.fsdp, self.model))
        _require(
            data * fsdp * model == devices,
            f"mesh data={self.data} fsdp={self.fsdp} model={self.model} does not fill {devices} device(s)",
        )
        return data, fsdp, model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of any stage.

    `precision` is that of the computation; parameters, quantiser and losses are float32. `remat` is what the backward
    pass recomputes (`none`, every `block`, all but matrix products: `dots`). `accumulate` above 1 takes a batch in so
    many parts, one after the other, which needs so much less memory. Checkpoints: every `save_every` steps, the newest
    `keep` stay, and the one with the best `best_metric` of an evaluation.
    """

    seed: int = 0
    steps: int = 500_000
    precision: str = "float32"
    remat: str = "none"
    accumulate: int = 1
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 50
    eval_every: int = 5000
    save_every: int = 1000
    keep: int = 3

    def __post_init__(self):
        _one_of("precision", self.precision, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("none", "block", "dots"))
        for name in ("steps", "accumulate", "log_every", "eval_every", "save_every", "keep"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.data.batch_size % self.accumulate == 0,
            f"data.batch_size={self.data.batch_size} does not split into accumulate={self.accumulate} parts",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRecipe(Recipe):
    """A stage-1 run.

    `data_init_clips` above 0 starts the tokenizer from so many clips (see `larp_jax.models.data_init`).
    """

    stage: str = "tokenizer"
    data_init_clips: int = 0
    model: TokenizerConfig = TokenizerConfig()
    prior: PriorConfig = PriorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    best_metric: str = "psnr"

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.loss.perceptual_frames <= self.model.frames,
            f"loss.perceptual_frames={self.loss.perceptual_frames} is more than the {self.model.frames} of a clip",
        )
        _require(
            not (self.loss.prior_weight and self.model.quantizer.kind == "kl"),
            "loss.prior_weight needs codes, which model.quantizer.kind='kl' has none of; set it to 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorRecipe(Recipe):
    """A stage-2 run: a generator of the codes of `tokenizer`, a path of its checkpoint.

    The codes are those of clips of `data.train`, made within the step, or with `tokens:DIR` those that
    `larp-jax tokenize` wrote. `tokenizer_fingerprint` is filled in when training starts; given, it is checked.
    A generator that predicts frames is given the first `cond_frames` of a clip.
    """

    stage: str = "generator"
    tokenizer: str = ""
    tokenizer_fingerprint: str = ""
    cond_frames: int = 5
    model: GeneratorConfig = GeneratorConfig()
    optim: GeneratorOptimConfig = GeneratorOptimConfig()
    best_metric: str = "top1"

    def __post_init__(self):
        super().__post_init__()
        _require(self.cond_frames > 0, f"cond_frames must be positive, got {self.cond_frames}")


STAGES = {"tokenizer": TokenizerRecipe, "generator": GeneratorRecipe}


def default_recipe(stage: str = "tokenizer"):
    """The published recipe of a stage as a locked, typed `ConfigDict` to change in a configuration file.

    Sizes left at 0 (widths, depths, heads, decoder patch) are filled from `size` when the recipe is parsed.
    """
    from ml_collections import ConfigDict

    _one_of("stage", stage, STAGES)
    return ConfigDict(_defaults(STAGES[stage]))


def take_sizes(recipe, given: typing.Collection[str]) -> None:
    """Makes a size count that was given on top of a recipe, as `--config.model.size=larp_l` on the command line.

    What it names (width, depth, heads) is its own then, whatever the recipe sets, but for the numbers that were given
    beside it. A warning tells of a size that changes nothing, since all of its numbers are set.

    Args:
      recipe: a `ConfigDict`, changed in place.
      given: dotted names of the settings that were given on top of it.
    """
    stage = str(recipe.get("stage", "tokenizer"))
    for section, (table, names) in SIZED.get(stage, {}).items():
        setting, size = f"{section}.size", _at(recipe, section).get("size")
        parts = {name: _at(recipe, name) for name in names}
        if setting in given:
            for name, part in parts.items():
                part.update({number: 0 for number in NUMBERS if f"{name}.{number}" not in given})
        chosen = setting in given or size != _defaults(STAGES[stage])[section]["size"]
        numbers = {tuple(part.get(number, 0) for number in NUMBERS) for part in parts.values()}
        if chosen and size in table and all(map(all, numbers)) and numbers != {table[size]}:
            given_too = f"width, depth and heads of {' and '.join(names)} are given, too"
            logger.warning(f"config.{setting}={size!r} changes nothing: {given_too}")


def _at(recipe, name: str):
    """The section of a recipe of that dotted name; an empty one where there is none."""
    for key in name.split("."):
        recipe = recipe.get(key, {}) if hasattr(recipe, "get") else {}
    return recipe if hasattr(recipe, "get") else {}


def _defaults(cls) -> dict:
    """Field defaults as declared, before `__post_init__` fills sizes."""
    return {
        field.name: _defaults(field.type)
        if dataclasses.is_dataclass(field.type)
        else field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(cls)
    }


def parse_recipe(values: typing.Mapping):
    """A recipe (ConfigDict, or what `config.json` holds) as its stage's frozen dataclass; `InputError` if wrong."""
    _require(isinstance(values, typing.Mapping) or hasattr(values, "to_dict"), f"config holds settings, got {values!r}")
    values = values.to_dict() if hasattr(values, "to_dict") else dict(values)
    stage = values.get("stage", "tokenizer")
    _one_of("config.stage", stage, STAGES)
    return from_dict(STAGES[stage], values, "config")


def from_dict(cls, values: typing.Mapping, name: str):
    """Builds a configuration dataclass from a mapping, checking every key and type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(unknown_key(f"{name}.{key}", key, fields))
        arguments[key] = _checked(fields[key].type, value, f"{name}.{key}")
    return cls(**arguments)


def unknown_key(path: str, key: str, known: typing.Iterable[str]) -> str:
    """The message for a key that does not exist, naming the nearest that does."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"{path} is not a setting; did you mean {path.rpartition('.')[0]}.{near[0]}?"


def _checked(kind, value, name: str):
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, typing.Mapping), f"{name} holds settings of its own, got {value!r}")
        return from_dict(kind, value, name)
    if kind is dict:
        _require(isinstance(value, typing.Mapping), f"{name} holds numbers by name, got {value!r}")
        return {key: _checked(float, number, f"{name}.{key}") for key, number in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def to_dict(config) -> dict:
    """A configuration dataclass as plain nested dictionaries, ready for JSON."""
    return dataclasses.asdict(config)
