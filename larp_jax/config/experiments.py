"""Experiments: tokenizers that are trained and compared under the same conditions, and base recipes for them."""

import dataclasses
import types
import typing

from larp_jax.config.checks import require
from larp_jax.config.flow import FlowRecipe
from larp_jax.config.recipes import default_recipe, parse_recipe
from larp_jax.config.training import GeneratorRecipe, TokenizerRecipe

# Recipes of `experiment_recipes`: two CPU cores, tests, and two sizes for a GPU.
SIZES = ("", "tiny", "gpu64", "gpu128")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms that are compared; `larp_jax.tools.experiment` runs them.

    Attributes:
      question: what the experiment is to find out, in one sentence.
      arms: the recipe of the tokenizer of each arm, by name. The first arm is the one that others are compared to. The
        `init_from` of an arm is the name of an earlier one, whose tokenizer of the same seed it starts from.
      generator: the recipe of the generator, the same for all arms. Its data and tokenizer are those of the arm.
      generators: recipes of generators by arm, for arms that have their own, such as a flow for an arm with latents.
      seeds: each arm is run with the seeds 0 to seeds - 1.
      windows: windows per training video whose codes the generator is trained on.
      samples: videos sampled from each generator.
      probe_steps: training steps of the classifier of real clips.
    """

    question: str
    arms: dict[str, TokenizerRecipe]
    generator: GeneratorRecipe
    generators: dict[str, GeneratorRecipe | FlowRecipe] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    windows: int = 2
    samples: int = 256
    probe_steps: int = 1200

    def __post_init__(self):
        require(len(self.arms) > 0, "an experiment needs at least one arm")
        earlier = []
        for name, arm in self.arms.items():
            require(name.replace("_", "").isalnum(), f"the name of arm {name!r} may contain only letters, digits and _")
            first = next(iter(self.arms.values()))
            require(
                (arm.model.clip_shape, arm.data) == (first.model.clip_shape, first.data),
                f"arm {name} has other clips or data than the first arm; they must be the same",
            )
            require(bool(arm.data.eval), f"arm {name} has no data.eval, on which arms are compared")
            require(
                arm.init_from in ("", *earlier),
                f"arm {name} has init_from={arm.init_from!r}; give the name of an earlier arm, or leave it out",
            )
            self._check_generator(name)
            earlier.append(name)
        for name in self.generators:
            require(name in self.arms, f"a generator is given for arm {name!r}, which does not exist")
        for field in ("seeds", "windows", "samples", "probe_steps"):
            require(getattr(self, field) > 0, f"{field} must be positive, got {getattr(self, field)}")

    def _check_generator(self, arm: str) -> None:
        """`InputError` if the generator of an arm does not sample what its tokenizer decodes."""
        model, tokenizer = self.generator_of(arm).model, self.arms[arm]
        ours, theirs = ("codes" if x.has_codes else "latents" for x in (model, tokenizer.model.quantizer))
        require(ours == theirs, f"arm {arm} has {theirs}, and its generator samples {ours}; give it another")
        require(model.given == "class", "the generator of an experiment must be class-conditional")
        require(
            arm not in self.generators or not tokenizer.init_from or tokenizer.trained != "decoder",
            f"arm {arm} trains a decoder only, so its generator is that of {tokenizer.init_from}; give it none",
        )

    def generator_of(self, arm: str) -> GeneratorRecipe | FlowRecipe:
        """The recipe of the generator of an arm."""
        return self.generators.get(arm, self.generator)


def make_experiment(
    question: str,
    arms: typing.Mapping[str, typing.Any],
    generator: typing.Any,
    *,
    generators: typing.Mapping[str, typing.Any] = types.MappingProxyType({}),
    **options: typing.Any,
) -> Experiment:
    """An `Experiment` from recipes as `ConfigDict`s.

    Args:
      question: what it is to find out.
      arms: recipe of the tokenizer of each arm, by name.
      generator: recipe of the generator.
      generators: recipes of generators of single arms, by arm.
      **options: the remaining fields of `Experiment`.

    Raises:
      InputError: a recipe or an option is invalid.
    """
    return Experiment(
        question=question,
        arms={name: parse_recipe(recipe) for name, recipe in arms.items()},
        generator=parse_recipe(generator),
        generators={name: parse_recipe(recipe) for name, recipe in generators.items()},
        **options,
    )


def experiment_options(size: str = "") -> dict[str, int]:
    """The other fields of `Experiment` that depend on the size, for `make_experiment`."""
    return {"windows": 1, "samples": 16, "probe_steps": 4} if size == "tiny" else {}


def experiment_recipes(size: str = "") -> tuple[typing.Any, typing.Any]:
    """Base recipes (tokenizer, generator) of experiments, as `ConfigDict`s.

    Args:
      size: empty for minutes on two CPU cores: clips of 8x32x32 as 16 tokens of 8 bits; `gpu64` or `gpu128` for one
        GPU: clips of 16x64x64 as 128, or 16x128x128 as 256 tokens of 10 bits; `tiny` for tests.

    Raises:
      InputError: there is no such size.
    """
    require(size in SIZES, f"variant {size!r} is not known; choose one of {', '.join(map(repr, SIZES))}")
    tokenizer, generator = default_recipe("tokenizer"), default_recipe("generator")
    model, prior, start, optim = tokenizer.model, tokenizer.prior, tokenizer.start, tokenizer.optim
    model.size = prior.size = "custom"
    model.frames, model.resolution = {"gpu64": (16, 64), "gpu128": (16, 128)}.get(size, (8, 32))
    model.num_tokens = {"gpu64": 128, "gpu128": 256}.get(size, 16)
    model.quantizer.codebook_size, model.quantizer.code_dim = (1024, 16) if size.startswith("gpu") else (256, 8)
    width, depth, heads = {"": (64, 2, 4), "tiny": (16, 1, 2)}.get(size, (512, 6, 8))
    for part in (model.encoder, model.decoder):
        part.width, part.depth, part.heads = width, depth, heads
    prior.width, prior.depth, prior.heads = width, depth, heads
    model.learned_encoder_patch_pe = model.learned_decoder_latent_pe = model.learned_decoder_patch_query_embed = True
    tokenizer.steps = {"": 1200, "tiny": 12}.get(size, 20_000)
    start.anchored = True
    start.continuous_steps, start.ramp_steps = tokenizer.steps * 2 // 5, tokenizer.steps // 10
    optim.learning_rate = 3e-4 if size.startswith("gpu") else 2e-3
    optim.b1, optim.b2 = 0.9, 0.95
    optim.warmup_steps = tokenizer.steps // 8
    optim.multipliers = {"prior": 1.0, "tokenizer/decoder/head": 10.0}  # the head starts at zero
    tokenizer.loss.reconstruction = "l2"
    tokenizer.loss.prior_weight = 0.001  # squared errors are small: the published 0.06 would dominate them
    tokenizer.loss.perceptual, tokenizer.loss.adversarial_weight = "none", 0.0

    generator.model.size = "custom"
    width, depth, heads = {"": (64, 3, 4), "tiny": (16, 1, 2)}.get(size, (512, 12, 8))
    generator.model.width, generator.model.depth, generator.model.heads = width, depth, heads
    generator.model.mlp_multiple = 32
    generator.model.init_std = width**-0.5
    generator.model.codebook_size = generator.model.num_tokens = generator.model.num_classes = 0
    generator.steps = {"": 800, "tiny": 12}.get(size, 20_000)
    generator.optim.learning_rate = 6e-4 if size.startswith("gpu") else 3e-3
    generator.optim.warmup_steps = generator.steps // 15
    generator.optim.ema_decay = 0.99

    for recipe in (tokenizer, generator):
        recipe.data.train, recipe.data.eval = "moving_shapes/plain:train", "moving_shapes/plain:test"
        recipe.data.batch_size = {"": 16, "tiny": 8}.get(size, 64)
        recipe.data.eval_clips = 16 if size == "tiny" else 128
        recipe.log_every = 50 if recipe.steps > 50 else 4
        recipe.eval_every = recipe.save_every = -(-recipe.steps // (2 if size == "tiny" else 4))
        recipe.precision = "bfloat16" if size.startswith("gpu") else "float32"
    generator.data.batch_size *= 2
    return tokenizer, generator
