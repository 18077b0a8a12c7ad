"""Settings of the flow generator, which samples continuous latents, and of its training."""

import dataclasses
from typing import ClassVar

from larp_jax.config.checks import MOST_POSITIONS, one_of, require
from larp_jax.config.condition import Conditional
from larp_jax.config.models import NUMBERS, TransformerConfig, from_size
from larp_jax.config.training import GeneratorOptimConfig, SecondStageRecipe

# Width, depth and heads of DiT-S to DiT-XL (Peebles & Xie 2022, arXiv 2212.09748, table 1).
FLOW_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig(Conditional):
    """The flow generator: a diffusion transformer (DiT, arXiv 2212.09748) over the latents of a clip.

    `size` selects width, depth and heads; each can be overridden. A clip has `num_tokens` latents of `code_dim`
    channels. If one of them or `num_classes` is 0, training sets it to the number of the tokenizer or the data.

    `condition` is what the generator is given: `class`, `frames` (the latents of the given frames), `class+frames` or
    `none`. `class_dropout` and `frames_dropout` are the probabilities that the class and the given frames are left out
    in training, drawn independently; without them (0) there is no guidance by the class or by the frames.
    """

    size: str = "L"
    width: int = 0
    depth: int = 0
    heads: int = 0
    num_tokens: int = 1024
    code_dim: int = 16
    condition: str = "class"
    num_classes: int = 101
    class_dropout: float = 0.1
    frames_dropout: float = 0.1

    # latents are those of whole clips, which are one block of frames
    ladder: ClassVar[tuple[int, ...]] = ()
    blocks: ClassVar[int] = 1
    adaptive: ClassVar[None] = None

    def __post_init__(self):
        numbers = from_size("model.size", self.size, FLOW_SIZES, self.width, self.depth, self.heads)
        for name, value in zip(NUMBERS, numbers, strict=True):
            object.__setattr__(self, name, value)
        TransformerConfig(width=self.width, depth=self.depth, heads=self.heads).check("model")
        one_of("model.condition", self.condition, ("class", "frames", "class+frames", "none"))
        for name in ("num_tokens", "code_dim", "num_classes"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        require(
            self.num_tokens <= MOST_POSITIONS,
            f"model.num_tokens={self.num_tokens} is above the limit of {MOST_POSITIONS}; lower it",
        )
        for part in ("class", "frames"):
            rate = getattr(self, f"{part}_dropout")
            require(0 <= rate < 1, f"model.{part}_dropout must be in [0, 1), got {rate}")

    def check_complete(self) -> None:
        """`InputError` if a size is 0, which only training from a tokenizer and data fills in."""
        for name in ("num_tokens", "code_dim", "num_classes"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got 0; give a number")

    @property
    def given(self) -> str:
        """The condition by its name: `class`, `frames`, `class+frames` or `none`."""
        return self.condition

    @property
    def has_codes(self) -> bool:
        """False: it samples continuous latents."""
        return False

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of the latents of a clip."""
        return self.num_tokens, self.code_dim

    @property
    def symbols(self) -> int:
        """Number of latents of a clip."""
        return self.num_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowOptimConfig(GeneratorOptimConfig):
    """Optimizer settings of a flow generator: those of DiT, AdamW at a constant rate without weight decay."""

    learning_rate: float = 1e-4
    b2: float = 0.999
    floor: float = 1.0
    ema_decay: float = 0.9999
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowRecipe(SecondStageRecipe):
    """Settings of a training run of a flow generator; see `SecondStageRecipe`.

    Latents are standardized: each channel gets mean 0 and standard deviation 1. The statistics are those of the folder
    in `data.train`, or else of `statistics_clips` clips at the start of training. Checkpoints contain them.
    """

    stage: str = "flow"
    statistics_clips: int = 1024
    model: FlowConfig = FlowConfig()
    optim: FlowOptimConfig = FlowOptimConfig()
    best_metric: str = "explained"

    def __post_init__(self):
        super().__post_init__()
        require(self.statistics_clips > 0, f"statistics_clips must be positive, got {self.statistics_clips}")
