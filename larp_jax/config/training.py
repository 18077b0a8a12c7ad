"""Settings of training runs. The defaults are the published recipe (LARP-L-Long)."""

import dataclasses
import math

from larp_jax.config.checks import at_least_0, check_seed, one_of, require, within
from larp_jax.config.models import DiscriminatorConfig, GeneratorConfig, PriorConfig, TokenizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the objective (LARP, sections 3.2 and 3.3). `prior_weight` 0 trains without a prior.

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
        one_of("loss.reconstruction", self.reconstruction, ("l1", "l2"))
        one_of("loss.adversarial", self.adversarial, ("ns", "ns_smooth", "hinge"))
        require(self.perceptual, "loss.perceptual must be 'none', 'lpips' or the path of its weights, got nothing")
        require(self.discriminator_every > 0, f"loss.discriminator_every={self.discriminator_every} must be positive")
        at_least_0("loss", self, *(name for name, value in vars(self).items() if isinstance(value, int | float)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam with linear warm-up and cosine decay per step (LARP, sections 3.3 and 4.1; constants of the released code).

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
        require(self.learning_rate > 0, f"optim.learning_rate must be positive, got {self.learning_rate}")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} must lie in [0, 1), got {getattr(self, name)}")
        at_least_0("optim", self, "warmup_steps", "clip_norm")
        within("optim", self, "floor")


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
        require(rate > 0, f"optim.discriminator_learning_rate must be positive, got {rate}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorOptimConfig(AdamConfig):
    """Of a generator: AdamW. `weight_decay` is for the kernels of linear layers only."""

    learning_rate: float = 6e-4
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        at_least_0("optim", self, "weight_decay")


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
        require(self.batch_size > 0, f"data.batch_size must be positive, got {self.batch_size}")
        at_least_0("data", self, "eval_clips", "workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.model)
        require(sizes.count(-1) <= 1, f"mesh={sizes}: only one axis may be -1")
        require(all(n > 0 or n == -1 for n in sizes), f"mesh={sizes}: sizes must be positive, or -1 for the rest")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """The mesh's (data, fsdp, model) over a number of devices."""
        rest = devices // max(1, -math.prod((self.data, self.fsdp, self.model)))
        data, fsdp, model = (rest if size == -1 else size for size in (self.data, self.fsdp, self.model))
        require(
            data * fsdp * model == devices,
            f"mesh data={self.data} fsdp={self.fsdp} model={self.model} does not fill {devices} device(s)",
        )
        return data, fsdp, model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of any stage.

    `precision` is that of the computation; parameters, quantizer and losses are float32. `remat` is what the backward
    pass recomputes (`none`, every `block`, all but matrix products: `dots`). `accumulate` above 1 takes a batch in so
    many parts, one after the other, which needs so much less memory. Checkpoints: every `save_every` steps, the newest
    `keep` stay, and the one with the best `best_metric` of an evaluation. `init_from` is a path of weights to start
    from, what `larp_jax.load_tokenizer` takes; resuming does not read it again.
    """

    seed: int = 0
    init_from: str = ""
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
        check_seed("seed", self.seed)
        one_of("precision", self.precision, ("float32", "bfloat16"))
        one_of("remat", self.remat, ("none", "block", "dots"))
        for name in ("steps", "accumulate", "log_every", "eval_every", "save_every", "keep"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            self.data.batch_size % self.accumulate == 0,
            f"data.batch_size={self.data.batch_size} does not split into accumulate={self.accumulate} parts",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartConfig:
    """How a small tokenizer starts to learn. All off in the published recipe, and without effect with `init_from`.

    `anchored` initializes by places, see `larp_jax.models.anchored_init`. For the first `continuous_steps` the decoder
    gets the latents themselves; then the codebook is set to the k-means of the latents of `kmeans_clips` training
    clips, and over `ramp_steps` codes replace the latents, z + a (code - z) with a from 0 to 1. The losses of quantizer
    and prior have the weight a.
    """

    anchored: bool = False
    continuous_steps: int = 0
    kmeans_clips: int = 320
    ramp_steps: int = 0

    def __post_init__(self):
        at_least_0("start", self, "continuous_steps", "ramp_steps")
        require(self.kmeans_clips > 0, f"start.kmeans_clips must be positive, got {self.kmeans_clips}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRecipe(Recipe):
    """A stage-1 run."""

    stage: str = "tokenizer"
    start: StartConfig = StartConfig()
    model: TokenizerConfig = TokenizerConfig()
    prior: PriorConfig = PriorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    best_metric: str = "psnr"

    def __post_init__(self):
        super().__post_init__()
        require(
            self.loss.perceptual_frames <= self.model.frames,
            f"loss.perceptual_frames={self.loss.perceptual_frames} is more than the {self.model.frames} of a clip",
        )
        require(
            self.loss.perceptual == "none" or self.model.resolution >= 16,
            f"loss.perceptual needs clips of 16 pixels, model.resolution={self.model.resolution}; set it to 'none'",
        )
        start = self.start
        require(
            not start.continuous_steps or start.continuous_steps + start.ramp_steps <= self.steps,
            f"start.continuous_steps={start.continuous_steps} and start.ramp_steps={start.ramp_steps} are more than"
            f" steps={self.steps}: the codes would never be used alone; lower them, or train longer",
        )
        require(
            not start.continuous_steps or self.model.quantizer.has_codes,
            "start.continuous_steps is for codes, which model.quantizer.kind='kl' has none of; set it to 0",
        )
        rows, tokens = self.prior.positions, self.model.num_tokens
        require(
            not rows or rows >= tokens, f"prior.positions={rows} are fewer than model.num_tokens={tokens}; set it to 0"
        )
        require(
            not (self.loss.prior_weight and not self.model.quantizer.has_codes),
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
        require(self.cond_frames > 0, f"cond_frames must be positive, got {self.cond_frames}")

    @property
    def given_frames(self) -> int:
        """Number of given frames; 0 if the generator is given none."""
        return self.cond_frames if self.model.has_frames else 0
