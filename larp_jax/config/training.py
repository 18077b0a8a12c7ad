"""Settings of training runs. The defaults are the published recipe (LARP-L-Long)."""

import dataclasses
import math
import re

from larp_jax.config.checks import at_least_0, check_seed, one_of, require, within
from larp_jax.config.condition import Conditional
from larp_jax.config.ladder import AUTO, RANDOM
from larp_jax.config.models import DiscriminatorConfig, GeneratorConfig, PriorConfig, TokenizerConfig
from larp_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective of a tokenizer (LARP, arXiv 2410.21264, sections 3.2 and 3.3).

    `reconstruction` is `l1` or `l2`. `frame_difference_weight` is the weight of the same distance between the changes
    from frame to frame (arXiv 2605.02134). If `prior_weight` is 0, no prior is trained.

    If `adversarial_weight` is 0, there is no discriminator. Otherwise `adversarial` selects the losses of the tokenizer
    and the discriminator: `ns` (non-saturating), `ns_smooth` (non-saturating, with smoothed targets) or `hinge`. From
    step `adversarial_start` on, the adversarial loss is part of the tokenizer's objective, and the discriminator is
    updated on every step that is a multiple of `discriminator_every`. The LeCam regularization is multiplied by the
    square of `lecam_weight`, as in the released code.

    `perceptual` is `none`, `lpips`, or the path of a file of LPIPS weights; `lpips` uses the file that `larp-jax
    doctor` names. If `perceptual_frames` is above 0, that many random frames of each clip are compared per step instead
    of all.

    If `alignment_weight` is above 0, a trained projector predicts the features of a frozen network from those of the
    decoder's patches after `alignment_layer` blocks (EVATok, arXiv 2603.12267; there 0.7 and block 3 of 12). The loss
    is minus their mean cosine. `alignment` is the teacher, by name (such as `vjepa2_l` or `vgg16`) or path.
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
    frame_difference_weight: float = 0.0
    alignment_weight: float = 0.0
    alignment: str = "vjepa2_l"
    alignment_layer: int = 3

    def __post_init__(self):
        one_of("loss.reconstruction", self.reconstruction, ("l1", "l2"))
        one_of("loss.adversarial", self.adversarial, ("ns", "ns_smooth", "hinge"))
        require(self.perceptual, "loss.perceptual must be 'none', 'lpips' or the path of its weights, got ''")
        require(self.alignment, "loss.alignment must be the name or path of a teacher, got ''; see alignment_weight")
        require(self.discriminator_every > 0, f"loss.discriminator_every={self.discriminator_every} must be positive")
        at_least_0("loss", self, *(name for name, value in vars(self).items() if isinstance(value, int | float)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorruptionConfig:
    """Corruption of what encoder and decoder are given in training; they still have to reconstruct whole clean clips.

    Evaluation and `tokenize` never corrupt anything. All of it is off in the published recipe.

    `future` is the probability that a clip ends early for the encoder (PV-VAE, arXiv 2605.02134). Of the parts of the
    clip, the encoder is given the first, a random number of them from one to all but one, and the decoder predicts the
    frames of the others. Parts are the blocks of a tokenizer with a ladder, of which those left out have no codes, and
    otherwise the rows of patches in time.

    Each clip loses a random share of its patches at the encoder, uniform from -0.1 to `patches` (0.7 in l-DeTok, arXiv
    2507.15856). Clips with a share below 0 lose none.

    With `noise`, the decoder is given (1 - t) x + `noise` t e in place of the latents x, where t is uniform in [0, 1]
    for each clip, and e normal noise as large as the latents (3 in l-DeTok).
    """

    future: float = 0.0
    patches: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        within("corruption", self, "future")
        require(0 <= self.patches < 1, f"corruption.patches must be in [0, 1), got {self.patches}")
        at_least_0("corruption", self, "noise")

    @property
    def of_encoder(self) -> bool:
        """Whether the encoder is given less than the clip."""
        return bool(self.future or self.patches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam with linear warmup and cosine decay of the learning rate; the constants are those of the released code.

    With `kind="muon"`, Muon updates the kernels of the blocks of transformers, and Adam the other parameters and all of
    the discriminator. Muon's updates are about as large as Adam's, so the same learning rates serve. No published
    recipe uses it.

    The learning rate rises from `floor` times `learning_rate` to `learning_rate` over `warmup_steps` steps, and decays
    to `floor` times `learning_rate` at the last step. `clip_norm` is the largest norm of the gradients; 0 turns
    clipping off. `ema_decay` is the decay of the EMA of the weights; 0 turns it off.
    """

    kind: str = "adam"
    learning_rate: float = 1e-4
    b1: float = 0.5
    b2: float = 0.9
    warmup_steps: int = 0
    floor: float = 0.01
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self):
        one_of("optim.kind", self.kind, ("adam", "muon"))
        require(self.learning_rate > 0, f"optim.learning_rate must be positive, got {self.learning_rate}")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} must be in [0, 1), got {getattr(self, name)}")
        at_least_0("optim", self, "warmup_steps", "clip_norm")
        within("optim", self, "floor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamConfig):
    """Optimizer settings of a tokenizer.

    `multipliers` scale the learning rate of all parameters below a path, such as `prior` or `tokenizer/encoder`. If
    several paths match, the longest counts; 0 freezes the parameters. The paper gives 50 for the prior, but the
    released code overwrites it with 1 before each step. The discriminator has its own optimizer, which differs only in
    the learning rate and has no weight decay. `weight_decay` (AdamW) applies only to the kernels of linear layers.
    """

    discriminator_learning_rate: float = 3e-5
    weight_decay: float = 0.0
    multipliers: dict = dataclasses.field(default_factory=lambda: {"prior": 1.0})

    def __post_init__(self):
        super().__post_init__()
        rate = self.discriminator_learning_rate
        require(rate > 0, f"optim.discriminator_learning_rate must be positive, got {rate}")
        at_least_0("optim", self, "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorOptimConfig(AdamConfig):
    """Optimizer settings of a generator: AdamW. `weight_decay` applies only to the kernels of linear layers."""

    learning_rate: float = 6e-4
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        at_least_0("optim", self, "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data and the evaluation data, each given as a SPEC such as `folder:PATH` or `tfds:NAME`.

    `batch_size` is the number of clips per step, over all hosts. `workers` is the number of processes that read clips;
    0 reads them in threads. `eval_clips` is the number of clips per evaluation; 0 means all. `flip` mirrors a random
    half of the training clips. The released configuration turns it on, but the released data set ignores it. A
    tokenizer with `loss.alignment_weight` may train on `features:DIR`, which `larp-jax features` wrote.

    Clips are consecutive frames at the rate of their video. With `fps`, videos are sampled at that rate, by the time
    at which each frame is shown; with `stride`, every `stride`-th frame is taken.

    Training clips have the shape of the model; or with `shapes`, such as 64x64,48x80,80x48 (heights x widths), those of
    each step have one of these, and are from the videos to whose aspect ratio it is nearest. For tokenizers.
    """

    train: str = ""
    eval: str = ""
    batch_size: int = 128
    eval_clips: int = 256
    workers: int = 0
    flip: bool = False
    fps: float = 0.0
    stride: int = 1
    shapes: str = ""

    def __post_init__(self):
        require(len(set(self.sizes)) == len(self.sizes), f"data.shapes={self.shapes} has one twice; leave it out")
        require(self.stride > 0, f"data.stride must be positive, got {self.stride}")
        require(not self.fps or self.stride == 1, "data.fps and data.stride cannot be combined; leave one out")
        require(self.batch_size > 0, f"data.batch_size must be positive, got {self.batch_size}")
        at_least_0("data", self, "eval_clips", "workers", "fps")

    @property
    def has_features(self) -> bool:
        """Whether training reads, together with each clip, the features that a tokenizer is aligned with."""
        return self.train.startswith("features:")

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each of the `shapes`."""
        found = []
        for text in self.shapes.split(",") if self.shapes else ():
            known = re.fullmatch("[1-9][0-9]{0,6}x[1-9][0-9]{0,6}", text.strip())
            require(bool(known), f"data.shapes={self.shapes} must be heights x widths such as 64x64,48x80")
            height, width = map(int, text.split("x"))
            found.append((height, width))
        return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; one of them can be -1, for all remaining devices.

    On several TPU slices, this is the mesh of each slice, and the batch is also split over the slices.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.model)
        require(sizes.count(-1) <= 1, f"mesh={sizes}: only one axis may be -1")
        require(all(n > 0 or n == -1 for n in sizes), f"mesh={sizes}: sizes must be positive, or -1 for the rest")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """Sizes (data, fsdp, model) of the mesh for this number of devices; `InputError` if they do not match."""
        rest = devices // max(1, -math.prod((self.data, self.fsdp, self.model)))
        data, fsdp, model = (rest if size == -1 else size for size in (self.data, self.fsdp, self.model))
        require(
            data * fsdp * model == devices,
            f"mesh data={self.data} fsdp={self.fsdp} model={self.model} does not match {devices} device(s)",
        )
        return data, fsdp, model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    `precision` is the dtype of the computation; parameters, quantizer and losses are always float32. `remat` is what
    the backward pass recomputes to save memory: `none`, every `block`, or all but the matrix products (`dots`).
    `accumulate` splits each batch into that many parts, which are processed one after the other to save memory.

    Metrics are logged every `log_every` steps, and evaluated every `eval_every` steps. Checkpoints are saved every
    `save_every` steps; the newest `keep` are kept, and the one with the best `best_metric`. `init_from` is a path of
    weights to initialize from, of any form that `larp_jax.load_tokenizer` accepts. It is not read again when a run
    resumes. `tracker` is a service that metrics and pictures are also sent to: `none`, `wandb` (Weights & Biases) or
    `mlflow`.
    """

    stage: str
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
    tracker: str = "none"

    @property
    def holds(self) -> str:
        """The kind of model that a checkpoint of this run holds: `tokenizer`, `generator` or `router`."""
        return self.stage

    def __post_init__(self):
        check_seed("seed", self.seed)
        one_of("tracker", self.tracker, ("none", "wandb", "mlflow"))
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
    """Initialization and first steps of small tokenizers. Off in the published recipe; ignored with `init_from`.

    `anchored` initializes attention by position in the clip, see `larp_jax.models.anchored_init`. In the first
    `continuous_steps` steps the decoder receives the latents z without quantization. Then k-means of the latents of
    `kmeans_clips` training clips gives the codebook. Over the next `ramp_steps` steps codes gradually replace the
    latents: the decoder receives z + a (code - z), where a rises from 0 to 1. The losses of the quantizer and the prior
    are also multiplied by a.
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
    """Settings of a training run of stage 1, which trains a tokenizer.

    `budget` is how many codes the clips have in training if there is a `model.ladder`: `random`, any numbers that fit,
    drawn for each clip and step; the same for all, as `--budget` of `larp-jax tokenize`; or `auto`, the choice of the
    trained router at the path `router`.

    `trained` is `all`, or `decoder`: then encoder, quantizer and codebook stay as in `init_from`, to the last bit, and
    the decoder is trained on their deterministic codes. Codes and fingerprint remain those of `init_from`, so codes
    that were written before decode with the new decoder. There is no prior: `loss.prior_weight` is set to 0.
    """

    stage: str = "tokenizer"
    budget: str = RANDOM
    router: str = ""
    trained: str = "all"
    start: StartConfig = StartConfig()
    corruption: CorruptionConfig = CorruptionConfig()
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
            f"loss.perceptual_frames={self.loss.perceptual_frames} is more than model.frames={self.model.frames}",
        )
        require(
            self.loss.perceptual == "none" or self.model.resolution >= 16,
            f"loss.perceptual needs a model.resolution of at least 16, got {self.model.resolution}; set it to 'none'",
        )
        for size in self.data.sizes:
            self._check_size(size)
        layer, depth = self.loss.alignment_layer, self.model.decoder.depth
        require(
            not self.loss.alignment_weight or 1 <= layer <= depth,
            f"loss.alignment_layer={layer} must be from 1 to model.decoder.depth={depth}",
        )
        start = self.start
        continuous = 0 if self.init_from else start.continuous_steps
        require(
            not continuous or continuous + start.ramp_steps <= self.steps,
            f"start.continuous_steps={start.continuous_steps} and start.ramp_steps={start.ramp_steps} are more than"
            f" steps={self.steps}: the codes would never be used alone; lower them, or train longer",
        )
        require(
            not start.continuous_steps or self.model.quantizer.has_codes,
            "start.continuous_steps needs codes, and model.quantizer.kind='kl' has none; set it to 0",
        )
        rows, tokens = self.prior.positions, self.model.query_rows
        needed = f"the largest of model.ladder, {tokens}" if self.model.ladder else f"model.num_tokens={tokens}"
        require(not rows or rows >= tokens, f"prior.positions={rows} is less than {needed}; set it to 0")
        if self.budget != RANDOM:
            require(self.model.adaptive is not None, f"budget={self.budget} needs model.ladder; leave it out")
        require(
            (self.budget == AUTO) == bool(self.router),
            f"budget={self.budget} and router={self.router!r}: budget=auto and the path of a router belong together",
        )
        self._check_corruption()
        one_of("trained", self.trained, ("all", "decoder"))
        if self.trained == "decoder":
            require(bool(self.init_from), "trained=decoder needs init_from, the path of the tokenizer whose codes stay")
            require(
                not self.corruption.of_encoder,
                "trained=decoder learns from the codes of whole clips; set corruption.future and corruption.patches"
                " to 0",
            )
            object.__setattr__(self, "loss", dataclasses.replace(self.loss, prior_weight=0.0))
        if self.budget not in (RANDOM, AUTO):
            self.model.adaptive.budget(self.budget, self.model.quantizer.codes)
        require(
            not (self.loss.prior_weight and not self.model.quantizer.has_codes),
            "loss.prior_weight needs codes, and model.quantizer.kind='kl' has none; set it to 0",
        )

    def _check_size(self, size: tuple[int, int]) -> None:
        """`InputError` unless clips of one of `data.shapes` suit all modules."""
        given = f"data.shapes has {size[0]}x{size[1]}"
        require(not self.model.is_patchwise, f"{given}, and model.layout='patchwise' takes one shape; leave it out")
        require(self.budget != AUTO, f"{given}, and the router of budget=auto takes one shape; leave out one of them")
        try:
            dataclasses.replace(self.model, shape=size)
        except InputError as error:
            raise InputError(f"{given}: {error}") from error
        patch = self.discriminator.patch_size
        require(
            not (self.loss.adversarial_weight and self.discriminator.kind == "transformer")
            or not any(side % patch for side in size),
            f"{given}, not divisible by discriminator.patch_size={patch}; change one of them",
        )
        require(
            self.loss.perceptual == "none" or min(size) >= 16,
            f"{given}, and loss.perceptual needs sides of at least 16; set it to 'none'",
        )

    def _check_corruption(self) -> None:
        """`InputError` if clips have nothing to leave out, or no second frame."""
        model = self.model
        require(
            not (self.corruption.of_encoder and model.is_patchwise),
            "model.layout='patchwise' has a code for each patch, so the encoder needs all of them; set"
            " corruption.future and corruption.patches to 0",
        )
        require(
            not self.corruption.future or self.future_parts > 1,
            f"corruption.future={self.corruption.future}: a clip of model.frames={model.frames} is one part in time, so"
            " there is no future to leave out; set it to 0, or lower model.patch_frames or raise model.blocks",
        )
        require(
            not self.loss.frame_difference_weight or model.frames > 1,
            "loss.frame_difference_weight needs clips of several frames, and model.frames is 1; set it to 0",
        )

    @property
    def future_parts(self) -> int:
        """Number of parts of a clip in time, of which `corruption.future` leaves out the last."""
        return self.model.blocks if self.model.ladder else self.model.encoder_grid[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondStageRecipe(Recipe):
    """Settings of a training run of stage 2, which trains a generator on what a tokenizer encodes.

    `tokenizer` is the path of the tokenizer's checkpoint. Each training step encodes clips of `data.train`, or reads
    what `larp-jax tokenize` wrote if `data.train` is `tokens:DIR`. `tokenizer_fingerprint` is set when training starts;
    if given, it is checked. A generator that is given frames receives the first `cond_frames` frames of a clip.
    """

    tokenizer: str = ""
    tokenizer_fingerprint: str = ""
    cond_frames: int = 5
    model: Conditional

    def __post_init__(self):
        super().__post_init__()
        require(self.cond_frames > 0, f"cond_frames must be positive, got {self.cond_frames}")
        require(not self.data.shapes, f"data.shapes={self.data.shapes} is for tokenizers; leave it out")

    @property
    def holds(self) -> str:
        """A generator, of any kind."""
        return "generator"

    @property
    def given_frames(self) -> int:
        """Number of given frames; 0 if the generator is given none."""
        return self.cond_frames if self.model.has_frames else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorRecipe(SecondStageRecipe):
    """Settings of a training run of a generator of codes; see `SecondStageRecipe`.

    With `context_noise`, random codes replace some of those that the next code is predicted from (reAR, arXiv
    2510.04450): in each sequence a share of them that is uniform from 0 to a maximum, which starts at `context_noise`
    (1 in reAR) and falls linearly to 0 over the first three quarters of training. 0 turns it off.
    """

    stage: str = "generator"
    context_noise: float = 0.0
    model: GeneratorConfig = GeneratorConfig()
    optim: GeneratorOptimConfig = GeneratorOptimConfig()
    best_metric: str = "top1"

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.context_noise <= 1, f"context_noise must be in [0, 1], got {self.context_noise}")
