"""The size of the prior.

larp-jax experiment prior_size --workdir runs/prior_size
"""

from larp_jax.config import experiment_options, experiment_recipes, make_experiment

SIZES = {"": ((32, 1, 2), (64, 2, 4), (128, 4, 4)), "tiny": ((8, 1, 2), (16, 1, 2))}  # width, depth, heads


def get_config(variant=""):
    """The experiment."""
    arms = {}
    for width, depth, heads in SIZES.get(variant, ((256, 3, 4), (512, 6, 8), (768, 12, 12))):
        name = f"width_{width}_depth_{depth}"
        arms[name], generator = experiment_recipes(variant)
        prior = arms[name].prior
        prior.width, prior.depth, prior.heads = width, depth, heads
    return make_experiment("Does a larger prior shape the codes more?", arms, generator, **experiment_options(variant))
