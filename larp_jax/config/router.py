"""Settings of the router, which chooses how many codes a clip gets, and of its training (EVATok, arXiv 2603.12267)."""

import dataclasses
import functools
import math

from larp_jax.config.checks import one_of, require
from larp_jax.config.clips import Clips
from larp_jax.config.ladder import Ladder
from larp_jax.config.models import NUMBERS, TokenizerConfig, TransformerConfig, from_size
from larp_jax.config.training import GeneratorOptimConfig, Recipe

OBJECTIVES = ("best", "rewards")
INPUTS = ("pixels", "differences")

# EVATok names its router ViT-S, here with the width, depth and heads of Touvron et al. 2020 (arXiv 2012.12877). It has
# 19.9 M parameters; how patches are made is not stated.
ROUTER_SIZES = {"S": (384, 12, 6)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig(Clips):
    """The router: a transformer over patches of a clip with a class token, and one output for each assignment.

    `size` selects width, depth and heads; each can be overridden. Patches are larger than those of a tokenizer: the
    router tells still clips from busy ones, and should cost little. `input` is what it reads of a patch: `pixels`, as
    published, or only how large the `differences` of neighboring pixels are along time, height and width, so that its
    choices follow motion more closely. If `frames`, `resolution`, `num_tokens`, `blocks` and `ladder` are 0 or empty,
    training sets them, and `shape`, to those of the tokenizer, which the rewards name.
    """

    size: str = "S"
    width: int = 0
    depth: int = 0
    heads: int = 0
    patch_frames: int = 4
    patch_size: int = 32
    input: str = "pixels"
    frames: int = 0
    resolution: int = 0
    shape: tuple[int, ...] = ()
    num_tokens: int = 0
    blocks: int = 0
    ladder: tuple[int, ...] = ()

    def __post_init__(self):
        one_of("model.input", self.input, INPUTS)
        numbers = from_size("model.size", self.size, ROUTER_SIZES, self.width, self.depth, self.heads)
        for name, value in zip(NUMBERS, numbers, strict=True):
            object.__setattr__(self, name, value)
        TransformerConfig(width=self.width, depth=self.depth, heads=self.heads).check("model")
        for name in ("frames", "resolution", "num_tokens", "blocks"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        for name in ("patch_frames", "patch_size"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        self._settle_shape()
        self._check_patch("patch_frames", "patch_size")
        if self.ladder and self.blocks and self.num_tokens:
            self.adaptive.check()

    def check_complete(self) -> None:
        """`InputError` if a setting is open, which only training on rewards fills in."""
        for name in ("frames", "resolution", "num_tokens", "blocks", "ladder"):
            require(bool(getattr(self, name)), f"model.{name} must be given, because no rewards say it")

    def for_tokenizer(self, tokenizer: TokenizerConfig) -> "RouterConfig":
        """These settings for the clips and assignments of a tokenizer with a ladder."""
        same = ("frames", "resolution", "shape", "num_tokens", "blocks", "ladder")
        return dataclasses.replace(self, **{name: getattr(tokenizer, name) for name in same})

    @functools.cached_property
    def adaptive(self) -> Ladder:
        """The assignments that the router chooses from."""
        return Ladder(self.ladder, self.blocks, self.num_tokens)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch (time, height, width)."""
        return self.patch_frames, self.patch_size, self.patch_size

    @property
    def patch_inputs(self) -> int:
        """How many numbers of each patch the router reads."""
        return math.prod(self.patch) * 3 if self.input == "pixels" else 3

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of patches (time, height, width)."""
        return self._grid(self.patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterRecipe(Recipe):
    """Settings of a training run of a router.

    `data.train` and `data.eval` are `rewards:DIR`, written by `larp-jax allocate`; they name the clips. The clips are
    not mirrored, and sampled as they were for their rewards. `tokenizer_fingerprint` is set when training starts; if
    given, it is checked.

    `objective` is what the router learns: `best` is to name the assignment with the highest reward, as published;
    `rewards` is to predict the rewards of all assignments, less their mean in each clip. The second learns from all
    values of a clip, and so needs fewer clips.
    """

    stage: str = "router"
    tokenizer_fingerprint: str = ""
    steps: int = 50_000
    model: RouterConfig = RouterConfig()
    optim: GeneratorOptimConfig = GeneratorOptimConfig()
    objective: str = "best"
    best_metric: str = "reward_share"

    def __post_init__(self):
        super().__post_init__()
        one_of("objective", self.objective, OBJECTIVES)
        data = self.data
        for name, default in (("flip", False), ("fps", 0.0), ("stride", 1), ("shapes", "")):
            value = getattr(data, name)
            require(value == default, f"data.{name}={value} is that of the rewards for a router; leave it out")
