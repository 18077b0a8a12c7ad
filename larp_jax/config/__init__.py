"""All settings, as frozen dataclasses, the tables of sizes, and the parsing of recipes.

A recipe (a file in `configs/`) changes the `ml_collections.ConfigDict` returned by `default_recipe`. `parse_recipe`
converts it to the frozen dataclasses that the code uses, and rejects invalid settings with a one-line message. The
defaults are the published recipe (LARP-L-Long; LARP, arXiv 2410.21264).
"""

from larp_jax.config.checks import (
    MOST_POSITIONS,
    check_seed,
)
from larp_jax.config.condition import Conditional
from larp_jax.config.experiments import Experiment, experiment_options, experiment_recipes, make_experiment
from larp_jax.config.flow import FLOW_SIZES, FlowConfig, FlowOptimConfig, FlowRecipe
from larp_jax.config.ladder import AUTO, RANDOM, Assignment, Greedy, Ladder
from larp_jax.config.models import (
    GENERATOR_SIZES,
    NUMBERS,
    PRIOR_SIZES,
    TOKENIZER_SIZES,
    TRAINING_FIELDS,
    DiscriminatorConfig,
    GeneratorConfig,
    PriorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TransformerConfig,
    swiglu_width,
)
from larp_jax.config.recipes import (
    SIZED,
    STAGES,
    completed,
    default_recipe,
    differences,
    flat,
    from_dict,
    named_numbers,
    parse_recipe,
    take_sizes,
    to_dict,
    unknown_key,
)
from larp_jax.config.router import ROUTER_SIZES, RouterConfig, RouterRecipe
from larp_jax.config.training import (
    AdamConfig,
    CorruptionConfig,
    DataConfig,
    GeneratorOptimConfig,
    GeneratorRecipe,
    LossConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    SecondStageRecipe,
    StartConfig,
    TokenizerRecipe,
)

__all__ = [
    "AUTO",
    "AdamConfig",
    "Assignment",
    "Conditional",
    "CorruptionConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "Experiment",
    "FLOW_SIZES",
    "FlowConfig",
    "FlowOptimConfig",
    "FlowRecipe",
    "GENERATOR_SIZES",
    "GeneratorConfig",
    "GeneratorOptimConfig",
    "GeneratorRecipe",
    "Greedy",
    "Ladder",
    "LossConfig",
    "MOST_POSITIONS",
    "MeshConfig",
    "NUMBERS",
    "OptimConfig",
    "PRIOR_SIZES",
    "PriorConfig",
    "RANDOM",
    "QuantizerConfig",
    "ROUTER_SIZES",
    "Recipe",
    "RouterConfig",
    "RouterRecipe",
    "SIZED",
    "SecondStageRecipe",
    "STAGES",
    "StartConfig",
    "TOKENIZER_SIZES",
    "TRAINING_FIELDS",
    "TokenizerConfig",
    "TokenizerRecipe",
    "TransformerConfig",
    "check_seed",
    "completed",
    "default_recipe",
    "differences",
    "experiment_options",
    "experiment_recipes",
    "flat",
    "from_dict",
    "make_experiment",
    "named_numbers",
    "parse_recipe",
    "take_sizes",
    "swiglu_width",
    "to_dict",
    "unknown_key",
]
